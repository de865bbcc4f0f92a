"""How long a tuning run is: epochs and examples a step to optimiser steps over packed sequences.

Which sequence comes when is data's; what happens at an epoch's end is hosted.py's."""

from __future__ import annotations

import time
from collections.abc import Sequence

from jobs.tuning.config import TuneConfig
from ot_ray.config import parse
from ot_ray.data import PackedSequence
from ot_ray.data.order import EpochOrder
from ot_ray.errors import TrainingError


def with_steps(config: TuneConfig, rows: int, examples: int) -> TuneConfig:
    """The settings with `training.steps`, `batch_size` and `warmup_steps` as numbers.

    - A step's batch is `training.batch_size` rows; with `examples_per_step` B it is `round(B * rows / examples)`, at
      least one row and at most all: as many rows as hold B examples on average, since short examples share a row.
    - Steps are `ceil(rows * epochs / batch)`; a batch goes over an epoch's end where it must.

    Args:
        rows: packed sequences, or images, of the data.
        examples: documents that are in them.

    Raises:
        ConfigError: the warm-up is longer than that.
    """
    training = config.training
    batch = training.batch_size
    if config.examples_per_step is not None:
        batch = min(max(1, round(config.examples_per_step * rows / examples)), rows)
    steps = training.steps if config.epochs is None else -(-rows * config.epochs // batch)
    warmup = training.warmup_steps if training.warmup_share is None else round(training.warmup_share * steps)
    values = {**training.model_dump(), "steps": steps, "batch_size": batch}
    values |= {"warmup_steps": warmup, "warmup_share": None}
    resolved = parse(type(training), values, f"training, of {steps} steps")
    return config.model_copy(update={"training": resolved, "epochs": None, "examples_per_step": None})


def epoch_ends(rows: int, batch: int, steps: int) -> list[int]:
    """The steps, counted from 1, after which an epoch is done, and the last step of the run."""
    whole = steps * batch // rows
    return sorted({*(-(-rows * epoch // batch) for epoch in range(1, whole + 1)), steps})


class TrainedTokens:
    """Tokens that a run has trained on after each step, padding left out; batches are those of `BatchStream`."""

    def __init__(self, sequences: Sequence[PackedSequence], batch: int, seed: int) -> None:
        self._sizes = [int(sequence.real.sum()) for sequence in sequences]
        self._order, self._batch = EpochOrder(len(sequences), seed), batch
        self._step, self._count = 0, 0

    def after(self, step: int) -> int:
        """The count after `step` steps, which must not fall from call to call."""
        rows = range(self._step * self._batch, step * self._batch)
        self._count += sum(self._sizes[self._order.at(row)] for row in rows)
        self._step = step
        return self._count


class TimeLimit:
    """Wall-clock seconds from now on."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._start = seconds, time.monotonic()

    def check(self, where: str) -> None:
        """Raises TrainingError once they are over."""
        if self._seconds is not None and time.monotonic() - self._start > self._seconds:
            raise TrainingError(
                f"the time limit of {self._seconds:g} s is over {where}; use fewer epochs, less data or a longer limit"
            )
