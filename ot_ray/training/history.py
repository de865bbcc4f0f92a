"""The figures of every step of a run, over all the times it was interrupted and went on.

Drawing them is evaluation's part."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ot_ray.errors import StoreError
from ot_ray.store import Store

Figures = dict[str, Any]


class RunHistory:
    """Keeps the steps of this process, and joins them with those before it.

    Each process that takes part writes ``runs/<run>/history/from-<first step>.jsonl`` as it goes, in the background,
    so that a run that is killed loses no more figures than steps. The joined history is ``runs/<run>/history.jsonl``.

    Args:
        every: steps between writes; 0 writes nothing before the end.
    """

    def __init__(self, store: Store, run: str, every: int) -> None:
        self._store, self._prefix, self._every = store, f"runs/{run}/history", every
        self.steps: list[Figures] = []
        """Figures of this process's own steps."""
        self._writing: threading.Thread | None = None

    def add(self, figures: Mapping[str, float]) -> None:
        """Keep one step's figures; `step` counts from 1."""
        self.steps.append(dict(figures))
        if self._every and figures["step"] % self._every == 0:
            self._write_aside()

    def close(self) -> list[Figures]:
        """Write the joined history, in the order of steps, and return it.

        The first step of a process that went on where another had stopped carries ``"resumed": true``.

        Raises:
            StoreError: the store cannot be read or written.
        """
        if self._writing is not None:
            self._writing.join()
        if self.steps:
            self._write(self.steps)
        joined = join([self._store.read(key).decode() for key in self._parts()])
        self._store.write(f"{self._prefix}.jsonl", _lines(joined))
        return joined

    def _write_aside(self) -> None:
        # One that is slow is not waited for: the next one writes all its steps.
        if self._writing is None or not self._writing.is_alive():
            self._writing = threading.Thread(
                target=self._try_to_write, args=(list(self.steps),), name="history", daemon=True
            )
            self._writing.start()

    def _try_to_write(self, steps: Sequence[Figures]) -> None:
        # Figures are no reason to end a run; `close` says if the store does not take them.
        with contextlib.suppress(StoreError):
            self._write(steps)

    def _write(self, steps: Sequence[Figures]) -> None:
        own = f"{self._prefix}/from-{int(steps[0]['step']):08d}.jsonl"
        for key in self._parts():
            # Written by a process that had started from a checkpoint which has since been given up.
            if key > own:
                self._store.delete(key)
        self._store.write(own, _lines(steps))

    def _parts(self) -> list[str]:
        return sorted(self._store.list(self._prefix))


def join(parts: Sequence[str]) -> list[Figures]:
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


def _lines(steps: Sequence[Figures]) -> bytes:
    return "".join(json.dumps(figures) + "\n" for figures in steps).encode()
