"""What the cluster's workers do in these tests: the project's own loop, engine and checkpoints on a model of a
thousand weights, holding still at given steps so that something can happen to them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ot_ray.data import BatchStream
from ot_ray.data.packing import PackedSequence
from ot_ray.store import LocalStore
from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.config import TrainingConfig
from ot_ray.training.engine import Engine, TorchEngine
from ot_ray.training.loop import train

STEPS, EVERY = 12, 2
CONFIG = TrainingConfig(
    steps=STEPS, batch_size=5, lr=0.02, warmup_steps=2, zero_stage=3, checkpoint_every=EVERY, seed=7
)
_HOLD_S = 400.0
_VOCABULARY = 32


class NextToken(nn.Module):
    """A token's embedding says what comes next; the loss is a mean over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, _VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        logits_BTV = self.head(torch.tanh(self.inner(self.embedding(input_ids))))
        losses_BT = functional.cross_entropy(logits_BTV[:, :-1].mT, labels[:, 1:], reduction="none")
        return {"loss": losses_BT.mean(dim=1).mean()}


def undisturbed() -> list[float]:
    """The losses of every step in one process, with plain PyTorch and nothing that fails."""
    return [step["loss"] for step in _train(TorchEngine(_model(), CONFIG, "cpu"), None, None)]


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Train under `payload["folder"]`; see `_Lives` for what else the payload says.

    Returns:
        The step after which this attempt began, and how many workers it had.
    """
    # DeepSpeed is imported where it is used: the scene that starts this runs without it.
    from ot_ray.training.deepspeed_engine import DeepSpeedEngine

    folder = Path(payload["folder"])
    engine = DeepSpeedEngine(_model(), CONFIG)
    checkpoints = Checkpoints(LocalStore(folder / "store"), "checkpoints", {"test": "cluster"}, patience_s=60)
    lives = _Lives(folder, payload, engine)
    history = _train(engine, checkpoints, lives.report)
    checkpoints.close()
    return {"first": history[0]["step"], "workers": engine.world_size}


class _Lives:
    """Writes down every step and, in attempt n (from 1), stays at step `hold[n]` until it is killed; with `die`,
    the last rank kills itself there instead."""

    def __init__(self, folder: Path, payload: Mapping[str, Any], engine: Engine) -> None:
        self._folder, self._engine = folder, engine
        attempts = folder / "attempts"
        if engine.rank == 0:
            with attempts.open("a") as file:
                file.write(f"{engine.world_size}\n")
        engine.barrier()
        self.attempt = len(attempts.read_text().splitlines())
        self._hold = payload["hold"].get(str(self.attempt))
        self._die = bool(payload.get("die"))

    def report(self, figures: Mapping[str, float]) -> None:
        if self._engine.rank == 0:
            line = {"attempt": self.attempt, "workers": self._engine.world_size, **figures}
            with (self._folder / "figures.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if figures["step"] != self._hold:
            return
        if self._die:
            if self._engine.rank == self._engine.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            # The others go on, into a step that cannot be done without it.
            return
        deadline = time.monotonic() + _HOLD_S
        while time.monotonic() < deadline:
            time.sleep(0.2)
        raise RuntimeError(f"attempt {self.attempt} was left alone at step {self._hold}")


def _train(
    engine: Engine, checkpoints: Checkpoints | None, report: Callable[[Mapping[str, float]], None] | None
) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, _VOCABULARY, (40, 12), generator=generator)
    places, real = torch.arange(12), torch.ones(12, dtype=torch.bool)
    sequences = [PackedSequence(row, places, row, real) for row in rows]
    stream = BatchStream(sequences, CONFIG.batch_size, CONFIG.seed)
    return train(engine, stream, CONFIG, checkpoints=checkpoints, report=report).history


def _model() -> NextToken:
    torch.manual_seed(11)
    return NextToken()
