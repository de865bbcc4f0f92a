"""A page of figures and one chart: a single HTML file without scripts that needs nothing else.

What stands on it is run_report.py's and the verbs' affair."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.value { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
img { width: 100%; height: auto; } .verdict { padding: .6rem 1rem; border-left: .3rem solid; }
.passed { border-color: #2f8f4e; background: #eef8f1; } .failed { border-color: #b8461f; background: #fbf0ec; }
ul { margin: .3rem 0; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        parts: HTML, one after another below the title.
    """
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body></html>\n",
        ]
    )


def picture(chart: bytes, shows: str) -> str:
    """A PNG in the page itself; `shows` says what is on it to whoever does not see it."""
    return f'<img alt="{escape(shows)}" src="data:image/png;base64,{base64.b64encode(chart).decode("ascii")}">'


def table(rows: Sequence[Sequence[str]], kind: str = "number", head: Sequence[str] = ()) -> str:
    """A name and its values in each row, plain text.

    Args:
        kind: of the values, `number` or `value`.
        head: a row above.
    """
    lines = ["".join(f"<th>{escape(text)}</th>" for text in head)] if head else []
    for name, *values in rows:
        cells = "".join(f'<td class="{kind}">{escape(value)}</td>' for value in values)
        lines.append(f"<td>{escape(name)}</td>{cells}")
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def flat(values: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{path}{name}.")
        else:
            found.append((f"{path}{name}", "" if value is None else str(value)))
    return found
