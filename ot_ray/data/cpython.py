"""Real text that every machine has: the running Python's own docstrings and its language reference.

It feeds the quickstart and the tests; reading it back as training data is left to `documents`."""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ot_ray.errors import DataError

SHORTEST_DOCUMENT = 80
"""Characters; a document below this teaches nothing."""

LONGEST_ECHO = 12
"""Words; a run this long that stands in two texts counts as copied."""

PARTS = {"train": 0.70, "validation": 0.15, "test": 0.15}
"""Share of the language reference's characters that each part of the customer's data gets."""

_EXCLUDED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(root: str | Path | None = None) -> Iterator[str]:
    """One document for each module below `root` (the standard library), in the order of their paths.

    A document is the module's docstring and those of its classes and functions, in source order, joined
    by blank lines. Nothing is imported; files that do not parse, tests and IDLE are left out.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _EXCLUDED.isdisjoint(path.relative_to(root).parts):
            text = "\n\n".join(_docstrings_of(path))
            if len(text) >= SHORTEST_DOCUMENT:
                yield text


def language_reference() -> list[tuple[str, str]]:
    """The topics of Python's `help()`: (name, text) pairs sorted by name.

    Raises:
        DataError: this Python was installed without its documentation topics.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "pydoc_data.topics: this Python has no documentation topics; install the full standard library"
        ) from None
    return sorted((name, text.strip()) for name, text in topics.items())


def distinct_topics(topics: Iterable[tuple[str, str]], elsewhere: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Topics without the paragraphs they share with each other or with the texts of `elsewhere`.

    Some topics repeat others nearly whole ("specialnames", "compound"). A paragraph stays in the
    shortest topic that has it, so that the small topics stay complete and the collections shrink. Two
    paragraphs are the same if they share a run of `LONGEST_ECHO` words, or all words if they have fewer.

    Returns:
        (name, text) pairs sorted by name; a topic that gets too short is dropped.
    """
    kept: dict[str, str] = {}
    seen = {run for text in elsewhere for run in _runs(text)}
    for name, text in sorted(topics, key=lambda topic: (len(topic[1]), topic[0])):
        paragraphs = [(part, _runs(part)) for part in re.split(r"\n\s*\n", text)]
        rest = "\n\n".join(part for part, runs in paragraphs if seen.isdisjoint(runs)).strip("\n")
        for _, runs in paragraphs:
            seen |= runs
        if len(rest) >= SHORTEST_DOCUMENT:
            kept[name] = rest
    return sorted(kept.items())


def write_quickstart_data(folder: str | Path, seed: int = 0) -> dict[str, int]:
    """Write the owner's public text and a customer's private text as JSONL files under `folder`.

    `public/train.jsonl` holds the docstrings; `customer/{train,validation,test}.jsonl` hold whole topics
    of the language reference, shuffled by `seed`: no topic is in two files, and what a topic shares with
    another or with the docstrings is left out, so that validation and test measure unseen text.

    Returns:
        Characters of text written, by file name relative to `folder`.

    Raises:
        DataError: this Python was installed without the sources or the documentation topics.
    """
    public = [{"text": text} for text in docstrings()]
    if not public:
        stdlib = sysconfig.get_paths()["stdlib"]
        raise DataError(f"{stdlib}: no standard-library sources; use a Python installed with its .py files")
    files = {"public/train.jsonl": public}
    topics = distinct_topics(language_reference(), elsewhere=(row["text"] for row in public))
    for part, share in split_topics(topics, seed).items():
        files[f"customer/{part}.jsonl"] = [{"name": name, "text": text} for name, text in share]
    for name, rows in files.items():
        _write_jsonl(Path(folder) / name, rows)
    return {name: sum(len(row["text"]) for row in rows) for name, rows in files.items()}


def split_topics(topics: Iterable[tuple[str, str]], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Deal whole topics, in an order shuffled by `seed`, to the part that lacks most of its share."""
    shuffled = sorted(topics)
    random.Random(seed).shuffle(shuffled)
    total = sum(len(text) for _, text in shuffled)
    lacking = {part: share * total for part, share in PARTS.items()}
    parts: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
    for name, text in shuffled:
        part = max(lacking, key=lambda part: lacking[part])
        parts[part].append((name, text))
        lacking[part] -= len(text)
    return parts


def _docstrings_of(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            # Old modules hold escape sequences that the compiler warns about.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _runs(text: str) -> set[str]:
    words = text.split()
    last = max(len(words) - LONGEST_ECHO, 0)
    return {" ".join(words[start : start + LONGEST_ECHO]) for start in range(last + 1)}


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
