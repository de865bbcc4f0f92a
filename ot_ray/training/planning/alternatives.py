"""Other ways to run the same distillation, from the cheapest to the dearest, for a plan that does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from ot_ray.training.config import TrainingConfig
from ot_ray.training.planning.memory import passes_of

MOST_WORKERS = 64
"""How many workers are tried at most."""


def alternatives(training: TrainingConfig, workers: int) -> Iterator[tuple[str, TrainingConfig, int]]:
    """Changes one at a time, then added up in the same order. None of them changes the losses.

    Yields:
        What is changed, as the command line takes it; the settings; and the number of workers.
    """
    for name, changed, count in _single(training, workers):
        yield name, changed, count
    names: list[str] = []
    together, count = training, workers
    for step in (_checkpointing, _one_row, _all_stages, _offload_optimizer, _most_workers, _offload_parameters):
        changed = step(together, count)
        if changed is None:
            continue
        name, together, count = changed
        names.append(name)
        if len(names) > 1:
            yield " and ".join(names), together, count


Change = tuple[str, TrainingConfig, int]


def _single(training: TrainingConfig, workers: int) -> Iterator[Change]:
    if (change := _checkpointing(training, workers)) is not None:
        yield change
    rows = passes_of(training, workers)[0]
    while rows > 1:
        rows //= 2
        yield _with(training, workers, micro_batch_size=rows)
    for stage in range(training.zero_stage + 1, 4):
        if workers > 1:
            yield _with(training, workers, zero_stage=stage)
    if (change := _offload_optimizer(training, workers)) is not None:
        yield change
    count = workers * 2
    while count <= min(MOST_WORKERS, training.batch_size):
        yield f"workers.count={count}", training, count
        count *= 2
    if (change := _offload_parameters(training, workers)) is not None:
        yield change


def _checkpointing(training: TrainingConfig, workers: int) -> Change | None:
    return None if training.activation_checkpointing else _with(training, workers, activation_checkpointing=True)


def _one_row(training: TrainingConfig, workers: int) -> Change | None:
    return None if passes_of(training, workers)[0] == 1 else _with(training, workers, micro_batch_size=1)


def _all_stages(training: TrainingConfig, workers: int) -> Change | None:
    return None if training.zero_stage == 3 or workers == 1 else _with(training, workers, zero_stage=3)


def _offload_optimizer(training: TrainingConfig, workers: int) -> Change | None:
    if training.offload_optimizer:
        return None
    stage = max(training.zero_stage, 1)
    changes = {"offload_optimizer": True} | ({} if stage == training.zero_stage else {"zero_stage": stage})
    return _with(training, workers, **changes)


def _most_workers(training: TrainingConfig, workers: int) -> Change | None:
    count = min(MOST_WORKERS, training.batch_size)
    return None if count <= workers else (f"workers.count={count}", training, count)


def _offload_parameters(training: TrainingConfig, workers: int) -> Change | None:
    if training.offload_parameters:
        return None
    changes = {"offload_parameters": True} | ({} if training.zero_stage == 3 else {"zero_stage": 3})
    return _with(training, workers, **changes)


def _with(training: TrainingConfig, workers: int, **changes: object) -> Change:
    changed = TrainingConfig.model_validate({**training.model_dump(), **changes})
    name = " and ".join(f"training.{field}={str(value).lower()}" for field, value in changes.items())
    return name, changed, workers
