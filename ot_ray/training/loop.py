"""The training loop: batches in, optimiser steps, figures out, checkpoints between.

It knows neither Ray nor what is being trained; the engine and the `report` function are handed to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ot_ray.data import BatchStream
from ot_ray.errors import TrainingError
from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.config import TrainingConfig
from ot_ray.training.engine import Batch, Engine
from ot_ray.training.schedule import lr_at

Report = Callable[[Mapping[str, float]], None]
Evaluate = Callable[[], Mapping[str, float]]


@dataclass
class TrainingResult:
    """What a run leaves behind besides its weights."""

    history: list[dict[str, float]] = field(default_factory=list)
    """One entry a step of this process: step, lr, loss parts, gradient norm, tokens/s; validation figures
    where they were taken. Steps done before a resume are not in it."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Validation figures, with the step after which they were taken."""


def train(
    engine: Engine,
    stream: BatchStream,
    config: TrainingConfig,
    *,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
    evaluate: Evaluate | None = None,
) -> TrainingResult:
    """Run `config.steps` optimiser steps, from the latest committed checkpoint if there is one.

    Every rank calls this together with equal arguments (but `report`).

    Args:
        stream: its batch size is `config.batch_size`.
        report: called on every rank after each step with that step's figures.
        evaluate: validation figures; called on every rank every `config.evaluate_every` steps and at the end.

    Raises:
        TrainingError: the loss or the gradients' norm is not finite (raised on every rank, with step and rank; the
            last checkpoint stays), or a checkpoint does not belong to this run.
    """
    torch.manual_seed(config.seed * 1_000_003 + engine.rank)
    resumed = checkpoints.resume(engine) if checkpoints is not None else None
    done = 0
    if resumed is not None:
        done, position = resumed
        stream.restore(position)
    result = TrainingResult()
    engine.module.train()
    for step in range(done, config.steps):
        figures = _one_step(engine, stream, config, step)
        last = step + 1 == config.steps
        if evaluate is not None and (last or _due(step, config.evaluate_every)):
            seen = _evaluated(engine, evaluate)
            result.evaluations.append({"step": step + 1, **seen})
            figures.update(seen)
        result.history.append(figures)
        if checkpoints is not None and (_due(step, config.checkpoint_every) and not last):
            checkpoints.save(engine, step + 1, stream.state(), config.keep_checkpoints)
        if report is not None:
            report(figures)
    engine.module.eval()
    return result


def _one_step(engine: Engine, stream: BatchStream, config: TrainingConfig, step: int) -> dict[str, float]:
    start = time.perf_counter()
    batch = stream.next_batch(engine.rank, engine.world_size)
    lr = lr_at(step, config)
    figures = engine.step(_micro_batches(batch, config.micro_batch_size), lr)
    _check_finite(figures, step, engine.rank)
    tokens = batch["input_ids"].numel() * engine.world_size
    return {"step": step + 1, "lr": lr, **figures, "tokens_per_s": tokens / (time.perf_counter() - start)}


def _evaluated(engine: Engine, evaluate: Evaluate) -> dict[str, float]:
    engine.module.eval()
    seen = dict(evaluate())
    engine.module.train()
    return seen


def _check_finite(figures: Mapping[str, float], step: int, rank: int) -> None:
    # Both are averages over all ranks, so that every rank stops here and none waits for another.
    for name, text in (("loss", "the loss"), ("grad_norm", "the gradients' norm")):
        if not math.isfinite(figures[name]):
            raise TrainingError(
                f"{text} became {figures[name]} at step {step + 1} (seen by rank {rank}); lower training.lr or "
                "lengthen training.warmup_steps, and resume from the last checkpoint"
            )


def _micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    rows = batch["input_ids"].shape[0]
    size = size or rows
    return [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, rows, size)]


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
