"""What the workers of test_resume.py run, as processes of their own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ot_ray.store import LocalStore, ObjectInfo, open_store
from ot_ray.store.base import Advance
from ot_ray.training import Checkpoints, DeepSpeedEngine, TorchEngine, TrainingConfig, TrainingResult, train
from tests.training.samples import PATIENCE, Dropped, stream, training

KILLED_AT = 5
CONFIG = training(steps=7, zero_stage=3, checkpoint_every=2)
ENGINES = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}


class Stuck(LocalStore):
    """Takes no tensors of step 4, but for half a file under a name of its own."""

    def upload(self, path: str | Path, key: str, progress: Advance | None = None) -> ObjectInfo:
        if "step-00000004" in key:
            half = self.root / key
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_bytes(Path(path).read_bytes()[:100])
            threading.Event().wait(PATIENCE)
        return super().upload(path, key, progress)


def trained(
    engine: str,
    checkpoints: Checkpoints | None,
    report: Callable[[Mapping[str, float]], None] | None = None,
    config: TrainingConfig = CONFIG,
) -> TrainingResult:
    made = TorchEngine(Dropped(), config, device="cpu") if engine == "torch" else DeepSpeedEngine(Dropped(), config)
    return train(made, stream(config), config, checkpoints=checkpoints, report=report)


def checkpoints_in(folder: str, stuck: bool = False) -> Checkpoints:
    return Checkpoints(Stuck(folder) if stuck else open_store(folder), "run", CONFIG.decisive())


def run_until_killed(folder: str, engine: str, writing: bool) -> None:
    """Ends as a machine that loses power does: after step 5, with step 4's checkpoint committed or being written."""
    look = checkpoints_in(folder)

    def report(figures: Mapping[str, float]) -> None:
        if figures["step"] == KILLED_AT and os.environ["RANK"] == "0":
            while not (_half_written(folder) if writing else 4 in look.committed()):
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    trained(engine, checkpoints_in(folder, writing), report)


def run_to_the_end(store_folder: str, folder: Path) -> None:
    """The rest of the run, and one that nothing ever happened to."""
    resumed = trained("deepspeed", checkpoints_in(store_folder)).history
    whole = trained("deepspeed", None).history
    torch.save({"resumed": resumed, "whole": whole}, folder / f"{os.environ['RANK']}.pt")


def _half_written(folder: str) -> bool:
    return any(Path(folder).glob("run/step-00000004/*/rank-0.safetensors"))
