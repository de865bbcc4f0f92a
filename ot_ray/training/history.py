"""The figures of every step of a run, over all the times it was interrupted and went on.

Drawing them is evaluation's part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ot_ray.store import Store

Figures = dict[str, Any]


class RunHistory:
    """Keeps the steps of this process, and joins them with those before it.

    Each process that takes part writes ``runs/<run>/history/from-<first step>.jsonl`` as it goes, so that a run
    that is killed loses no more figures than steps. The joined history is ``runs/<run>/history.jsonl``.

    Args:
        every: steps between writes; 0 writes nothing (ranks other than 0, runs without checkpoints).
    """

    def __init__(self, store: Store, run: str, every: int) -> None:
        self._store, self._prefix, self._every = store, f"runs/{run}/history", every
        self._steps: list[Figures] = []

    def add(self, figures: Mapping[str, float]) -> None:
        """Keep one step's figures; `step` counts from 1."""
        self._steps.append(dict(figures))
        if self._every and figures["step"] % self._every == 0:
            self._write()

    def close(self, write: bool) -> list[Figures]:
        """The joined history, in the order of steps; written to the store where `write` is set.

        The first step of a process that went on where another had stopped carries ``"resumed": true``.
        """
        if write and self._steps:
            self._write()
        joined = join([self._store.read(key).decode() for key in self._store.list(self._prefix)]) or self._steps
        if write:
            lines = "".join(json.dumps(figures) + "\n" for figures in joined)
            self._store.write(f"{self._prefix}.jsonl", lines.encode())
        return joined

    def _write(self) -> None:
        lines = "".join(json.dumps(figures) + "\n" for figures in self._steps)
        self._store.write(f"{self._prefix}/from-{int(self._steps[0]['step']):08d}.jsonl", lines.encode())


def join(parts: list[str]) -> list[Figures]:
    """Join the histories of successive processes, given in the order of their first steps.

    A step that two of them did, because the first was killed before its checkpoint, counts as the later one's.
    """
    steps: dict[int, Figures] = {}
    for part in parts:
        figures = [json.loads(line) for line in part.splitlines()]
        first = int(figures[0]["step"])
        steps = {step: kept for step, kept in steps.items() if step < first}
        for entry in figures:
            steps[int(entry["step"])] = entry
        if first > 1:
            steps[first] = {**steps[first], "resumed": True}
    return [steps[step] for step in sorted(steps)]
