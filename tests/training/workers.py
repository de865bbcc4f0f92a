"""What the workers of a group run. Each rank leaves what it saw in `<folder>/<rank>.pt`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ot_ray.errors import TrainingError
from ot_ray.store import open_store
from ot_ray.training import (
    Checkpoints,
    DeepSpeedEngine,
    DistillConfig,
    TorchEngine,
    TrainingConfig,
    TrainingResult,
    distill,
    train,
)
from tests.training.samples import Dropped, distill_model, language_model, stream, training

MODULES = {"language": language_model, "distill": distill_model}
# Every stage in both precisions for one module; for the other, what differs most.
CASES = [
    *(("language", precision, stage) for precision in ("float32", "bfloat16") for stage in range(4)),
    ("distill", "float32", 0),
    ("distill", "float32", 3),
    ("distill", "bfloat16", 2),
]
KILLED_AT = 5


def case_config(precision: str, stage: int) -> TrainingConfig:
    return training(precision=precision, zero_stage=stage, micro_batch_size=1, grad_clip=0.5)


def resume_config(stage: int, precision: str = "float32") -> TrainingConfig:
    return training(steps=7, zero_stage=stage, precision=precision, checkpoint_every=2, keep_checkpoints=2)


class Poisoned(nn.Module):
    """From its third pass on, on rank 1 only, the loss or else its gradient is not a number."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner, self._what, self._passes = Dropped(), what, 0

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self._passes += 1
        loss = self.inner(**batch)["loss"]
        if self._passes >= 3 and os.environ["RANK"] == "1":
            # The root's slope at 0 is infinite, and infinity times 0 is no number.
            loss = loss * float("nan") if self._what == "loss" else loss + torch.sqrt(loss * 0.0)
        return {"loss": loss}


def run_everything(folder: Path, distilling: dict[str, Any]) -> None:
    """All that needs two healthy workers, one after another, because starting them takes longer than the rest."""
    seen = {
        "cases": {case: _case(*case) for case in CASES},
        "poisoned": {(what, stage): _poisoned(what, stage, folder) for what, stage in (("loss", 2), ("gradient", 0))},
        "indivisible": _message(lambda: DeepSpeedEngine(Dropped(), training(batch_size=3))),
        "few rows": _message(lambda: DeepSpeedEngine(Dropped(), training(batch_size=1))),
        "resumed": {stage: _stopped_and_resumed(stage, folder) for stage in range(4)},
        "uninterrupted": _trained(resume_config(3), None).history,
        "distilled": distill(DistillConfig.model_validate(distilling)),
    }
    # A norm that DeepSpeed keeps itself, after a step that it left out.
    seen["poisoned"]["gradient", 3] = _poisoned("gradient", 3, folder)
    torch.save(seen, folder / f"{os.environ['RANK']}.pt")


def run_until_killed(checkpoints: str, engine: type) -> None:
    """A run that ends as a machine that loses power does: between two checkpoints, without a word."""

    def report(figures: Mapping[str, float]) -> None:
        if figures["step"] == KILLED_AT and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    _trained(resume_config(3), checkpoints, engine, report)


def run_to_the_end(checkpoints: str, folder: Path) -> None:
    result = _trained(resume_config(3), checkpoints)
    torch.save(result.history, folder / f"{os.environ['RANK']}.pt")


def _trained(
    config: TrainingConfig,
    folder: str | None,
    engine: type = DeepSpeedEngine,
    report: Callable[[Mapping[str, float]], None] | None = None,
) -> TrainingResult:
    checkpoints = Checkpoints(open_store(folder), "run", config.model_dump()) if folder else None
    device = {"device": "cpu"} if engine is TorchEngine else {}
    return train(engine(Dropped(), config, **device), stream(config), config, checkpoints=checkpoints, report=report)


def _case(name: str, precision: str, stage: int) -> dict[str, Any]:
    module, config = MODULES[name](), case_config(precision, stage)
    engine = DeepSpeedEngine(module, config)
    history = train(engine, stream(config), config).history
    return {
        "history": history,
        "weights": engine.trainable_state(),
        "frozen gradients": [
            name for name, p in engine.module.named_parameters() if not p.requires_grad and p.grad is not None
        ],
        "rotary": {str(buffer.dtype) for name, buffer in module.named_buffers() if name.endswith("inv_freq")},
    }


def _poisoned(what: str, stage: int, folder: Path) -> str:
    config = training(zero_stage=stage, checkpoint_every=1)
    checkpoints = Checkpoints(open_store(str(folder / f"{what}-{stage}")), "run", {})
    return _message(
        lambda: train(DeepSpeedEngine(Poisoned(what), config), stream(config), config, checkpoints=checkpoints)
    )


def _stopped_and_resumed(stage: int, folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    config, place = resume_config(stage, "bfloat16"), str(folder / f"resume-{stage}")
    whole = _trained(config, None).history

    def stop(figures: Mapping[str, float]) -> None:
        if figures["step"] == KILLED_AT:
            raise InterruptedError

    try:
        _trained(config, place, report=stop)
    except InterruptedError:
        return whole, _trained(config, place).history
    raise RuntimeError("the run was not stopped")


def _message(work: Callable[[], Any]) -> str:
    try:
        work()
    except TrainingError as error:
        return str(error)
    return "no error"
