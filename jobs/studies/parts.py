"""The parts of a study's rows and their names by content: rows that need the same emulator or reference share it.

What a part computes is work.py's; where it runs is running.py's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.studies.config import Change, Row, StudyConfig
from jobs.studies.work import Emulator, FineTuned, Tuned, ZeroShot
from ot_ray.model import ModelConfig
from ot_ray.training import TrainingConfig

SCHEMA = 1
"""Grows when a part comes to mean something else, so that older results are not taken for it."""


@dataclass(frozen=True)
class Contents:
    """Digests of what a study reads."""

    model: str
    public: str
    train: str
    test: str


@dataclass(frozen=True)
class Part:
    """Something to compute, and the key under which its result is kept."""

    key: str
    work: ZeroShot | FineTuned | Emulator | Tuned


@dataclass(frozen=True)
class RowParts:
    """A row at one seed: its tuned adapter and what that needs."""

    seed: int
    change: Change
    row: Row
    zero: Part
    reference: Part
    emulator: Part
    tuned: Part


class Parts:
    """Names the parts of one study."""

    def __init__(self, config: StudyConfig, model: ModelConfig, depth: int, contents: Contents, store: str) -> None:
        self._config, self._model, self._depth = config, model, depth
        self._contents, self._store = contents, store

    def rows(self) -> Iterator[tuple[str, RowParts]]:
        """Every row with its axis, seed by seed, so that a study that is stopped has whole seeds."""
        for seed in self._config.seeds:
            for axis, changes in self._config.changes().items():
                for change in changes:
                    yield axis, self._row(change, seed)

    def _row(self, change: Change, seed: int) -> RowParts:
        row, contents = change.of(self._config.centre), self._contents
        plan = row.plan(self._depth)
        zero = self._piece("zero-shot", ZeroShot(model=self._model), test=contents.test)
        tuning, training = self._config.reference(row, seed), self._config.tuning(row, seed)
        texts = {"train": contents.train, "test": contents.test}
        reference = self._piece(
            "fine-tuned", FineTuned(model=self._model, training=tuning), training=_decisive(tuning), **texts
        )
        emulator = self._emulator(row, seed)
        decides = {
            "method": row.method,
            "lora": row.lora.model_dump(mode="json") if row.method == "lora" else None,
            "bottleneck": row.bottleneck.model_dump(mode="json") if row.method == "bottleneck" else None,
        }
        tuned = self._piece(
            "rows",
            Tuned(model=self._model, row=row, training=training),
            split=str(plan),
            emulator=emulator.key,
            reference=reference.key,
            training=_decisive(training),
            **decides,
            **texts,
        )
        return RowParts(seed, change, row, zero, reference, emulator, tuned)

    def _emulator(self, row: Row, seed: int) -> Part:
        plan = row.plan(self._depth)
        # An emulator that is not distilled is the same whatever the seed.
        training = self._config.distillation(row, seed) if row.distilled else None
        digest = self._digest(
            split=plan.model_dump(mode="json"),
            emulator=row.emulator.model_dump(mode="json"),
            loss=self._config.loss.model_dump(mode="json") if training else None,
            training=_decisive(training) if training else None,
            public=self._contents.public,
            test=self._contents.test,
        )
        work = Emulator(
            model=self._model,
            split=plan,
            emulator=row.emulator,
            loss=self._config.loss,
            training=training,
            store=self._store,
            weights=f"emulators/{digest}.safetensors",
        )
        return Part(f"emulators/{digest}.json", work)

    def _piece(self, folder: str, work: ZeroShot | FineTuned | Tuned, **decides: Any) -> Part:
        return Part(f"{folder}/{self._digest(**decides)}.json", work)

    def _digest(self, **decides: Any) -> str:
        values = {"schema": SCHEMA, "model": self._contents.model, "dtype": self._model.dtype, **decides}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:20]


def _decisive(training: TrainingConfig) -> dict[str, Any]:
    return training.decisive()
