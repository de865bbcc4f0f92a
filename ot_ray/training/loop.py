"""The training loop: batches in, optimiser steps, figures out, checkpoints between.

It knows neither Ray nor what is being trained; the engine and the `report` function are handed to it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from ot_ray.data import Batches
from ot_ray.errors import OTRayError, TrainingError
from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.config import TrainingConfig
from ot_ray.training.engine import Batch, Engine
from ot_ray.training.schedule import lr_at

Report = Callable[[Mapping[str, float]], None]
Evaluate = Callable[[], Mapping[str, float]]

_LAST_WAIT_S = 60.0
"""Seconds that a run which fails gives a checkpoint under way; its other workers may be gone."""


@dataclass
class TrainingResult:
    """What a run leaves behind besides its weights."""

    history: list[dict[str, float]] = field(default_factory=list)
    """One entry a step of this process: step, lr, loss parts, gradient norm, tokens/s (or images/s) of all workers,
    seconds, and how many of these were waited for data, by the worker that waited longest; validation figures where
    they were taken. Steps done before a resume are not in it."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Validation figures, with the step after which they were taken."""


def train(
    engine: Engine,
    batches: Batches,
    config: TrainingConfig,
    *,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
    evaluate: Evaluate | None = None,
    milestones: Collection[int] = (),
    record: Report | None = None,
) -> TrainingResult:
    """Run `config.steps` optimiser steps, from the latest committed checkpoint if there is one.

    Every rank calls this together with equal arguments (but `report`). The last step is a checkpoint too, so that
    whoever comes again has the weights. However it ends, a checkpoint under way is given time to be committed.

    Args:
        batches: global batches of `config.batch_size` rows.
        report: called on every rank after each step with that step's figures.
        evaluate: validation figures; called on every rank every `config.evaluate_every` steps and at the end.
        milestones: steps, counted from 1, after which there are validation figures and a checkpoint as at the end.
        record: called as `report` is, but before the step can become a checkpoint: a run that goes on from there has
            recorded it.

    Raises:
        TrainingError: the loss or the gradients' norm is not finite (raised on every rank, with the step, the rank
            it came from, and the checkpoint that is kept), or a checkpoint does not belong to this run.
        StoreError, StoreUnavailableError: a checkpoint could not be read or written.
    """
    result = TrainingResult()
    try:
        done = _start(engine, batches, config, checkpoints)
        engine.module.train()
        if evaluate is not None and done == config.steps:
            result.evaluations.append({"step": done, **_evaluated(engine, evaluate)})
        for step in range(done, config.steps):
            figures = _one_step(engine, batches, config, step)
            _check_finite(figures, step, engine, checkpoints)
            last = step + 1 == config.steps or step + 1 in milestones
            if evaluate is not None and (last or _due(step, config.evaluate_every)):
                seen = _evaluated(engine, evaluate)
                result.evaluations.append({"step": step + 1, **seen})
                figures.update(seen)
            result.history.append(figures)
            if record is not None:
                record(figures)
            if checkpoints is not None and config.checkpoint_every and (last or _due(step, config.checkpoint_every)):
                checkpoints.save(engine, step + 1, batches.state())
            if report is not None:
                report(figures)
        if checkpoints is not None:
            checkpoints.finish(engine)
    except BaseException:
        # The error that is on its way says more than one of a checkpoint that it interrupted.
        with contextlib.suppress(OTRayError):
            if checkpoints is not None:
                checkpoints.close(_LAST_WAIT_S)
        raise
    engine.module.eval()
    return result


def _start(engine: Engine, batches: Batches, config: TrainingConfig, checkpoints: Checkpoints | None) -> int:
    """Set random state, weights and data to where the run goes on; the number of steps done."""
    torch.manual_seed(config.seed * 1_000_003 + engine.rank)
    resumed = checkpoints.resume(engine) if checkpoints is not None else None
    if resumed is None:
        return 0
    if not resumed.random:
        text = f"{config.seed}/{resumed.step}/{engine.rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
    batches.restore(resumed.streams)
    return resumed.step


def _one_step(engine: Engine, batches: Batches, config: TrainingConfig, step: int) -> dict[str, float]:
    start = time.perf_counter()
    batch = batches.next_batch(engine.rank, engine.world_size)
    # Whoever waits longest keeps the others waiting in the step.
    waited = max(engine.gather(time.perf_counter() - start))
    lr = lr_at(step, config)
    figures = engine.step(batch, lr)
    seconds = time.perf_counter() - start
    return {
        "step": step + 1,
        "lr": lr,
        **figures,
        **_speed(batch, config.batch_size / seconds),
        "seconds": seconds,
        "data_wait": waited,
        "data_wait_share": waited / seconds,
    }


def _speed(batch: Batch, rows_per_s: float) -> dict[str, float]:
    """Tokens a second of text, without padding; images a second of images."""
    if "input_ids" not in batch:
        return {"images_per_s": rows_per_s}
    tokens = batch["real"] if "real" in batch else torch.ones_like(batch["input_ids"])
    return {"tokens_per_s": rows_per_s * float(tokens.sum()) / len(tokens)}


def _evaluated(engine: Engine, evaluate: Evaluate) -> dict[str, float]:
    engine.module.eval()
    seen = dict(evaluate())
    engine.module.train()
    return seen


def _check_finite(figures: Mapping[str, float], step: int, engine: Engine, checkpoints: Checkpoints | None) -> None:
    # Both are the same on every rank, so that every rank stops here and none waits for another.
    name = next((name for name in ("loss", "grad_norm") if not math.isfinite(figures[name])), None)
    if name is None:
        return
    text = "the loss" if name == "loss" else "the gradients' norm"
    finite = engine.gather(math.isfinite(engine.local_loss))
    bad = [str(rank) for rank, is_finite in enumerate(finite) if not is_finite]
    whose = f"on the rows of rank {', '.join(bad)}" if bad else "though every rank's loss is finite"
    raise TrainingError(
        f"{text} became {figures[name]} at step {step + 1} {whose}; {_what_is_kept(engine, checkpoints)}; lower "
        "training.lr or lengthen training.warmup_steps"
    )


def _what_is_kept(engine: Engine, checkpoints: Checkpoints | None) -> str:
    latest = None
    if checkpoints is not None:
        with contextlib.suppress(OTRayError):
            checkpoints.wait()
        latest = engine.gather(checkpoints.latest)[0]
    return "no checkpoint was taken" if latest is None else f"the last checkpoint is step {latest}"


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
