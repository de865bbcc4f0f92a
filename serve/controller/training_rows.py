"""One line of training data as a JSON value, strictly: what two parsers could read in two ways is refused.

What the value means is left to validation.py."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

MOST_LEVELS = 32
"""Levels of nesting; an example has four."""

_SIGNS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]')


class RowError(ValueError):
    """The line is no example. Internal: the report says in which line."""


def read_row(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        RowError: not UTF-8, not JSON, nested too deeply, a key stands twice, or a number is none that JSON knows or
            that a computer holds.
    """
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from None
    if _levels(text) > MOST_LEVELS:
        raise RowError(f"nested more than {MOST_LEVELS} levels deep")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON at column {error.colno}: {error.msg}") from None
    except RowError:
        raise
    except ValueError:
        raise RowError("a number has too many digits") from None


def _levels(text: str) -> int:
    """How deep lists and objects are nested, without recursion; text in quotes does not count."""
    if text.count("[") + text.count("{") <= MOST_LEVELS:
        return 0
    level = deepest = 0
    for sign in _SIGNS.finditer(text):
        if sign[0] in "[{":
            level += 1
            deepest = max(deepest, level)
        elif sign[0] in "]}":
            level -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RowError(f"the key {twice[:80]!r} stands twice in one object")
    return values


def _refuse(constant: str) -> NoReturn:
    raise RowError(f"{constant} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RowError(f"{digits[:40]} is too large for a number")
    return value
