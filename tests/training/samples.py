"""What the tests of this room train: tiny modules, packed data, and groups of real worker processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ot_ray.data import BatchStream, PackedSequence, TokenSpan, pack
from ot_ray.model import DistillLoss, DistillModel, DistillOptions, LanguageModel, SplitPlan
from ot_ray.training import TrainingConfig
from tests.fixtures.models import VOCAB, tiny_model, tokens

PLAN = SplitPlan(bottom=2, keep=2, top=1)
KEPT = [0, 2]
LENGTH = 12
PATIENCE = 600.0
"""Seconds a group of workers may take; starting two of them takes most of it on a busy machine."""


def sequences(count: int = 20, seed: int = 1) -> list[PackedSequence]:
    """Random documents of `LENGTH` tokens, one a sequence, so that every row counts the same in a mean."""
    rows = tokens(count, LENGTH, seed).tolist()
    return pack([TokenSpan(row, [True] * LENGTH) for row in rows], LENGTH, 0)


def training(**values: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"steps": 6, "batch_size": 4, "lr": 3e-3, "warmup_steps": 2, "weight_decay": 0.1, "seed": 3, **values}
    )


def stream(config: TrainingConfig) -> BatchStream:
    return BatchStream(sequences(), config.batch_size, config.seed)


def distill_model(**options: Any) -> DistillModel:
    return DistillModel(tiny_model("llama"), PLAN, KEPT, DistillLoss(), DistillOptions(**options))


def language_model() -> LanguageModel:
    """Only the two outer layers learn, as in tuning."""
    model = tiny_model("llama", depth=4)
    model.requires_grad_(False)
    for layer in (0, 3):
        model.model.layers[layer].requires_grad_(True)
    return LanguageModel(model)


class Dropped(nn.Module):
    """A small net whose every pass draws from the random state; `frozen` never learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.frozen = nn.Embedding(VOCAB, 16).requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, VOCAB))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **rest: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(self.frozen(input_ids))
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


@contextmanager
def started_group(work: Callable[..., None], world_size: int, *args: Any) -> Iterator[list[BaseProcess]]:
    """`work(*args)` in new processes with the variables that launch sets for a worker; none outlives the context."""
    # The store at which they meet is this process's, so that no other takes its port before rank 0 is up.
    store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_worker, args=(rank, world_size, store.port, work, args)) for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        del store


def run_group(work: Callable[..., None], world_size: int, *args: Any) -> None:
    """Run a group to its end; a worker that fails or hangs fails the test."""
    deadline = time.monotonic() + PATIENCE
    with started_group(work, world_size, *args) as processes:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * world_size


def _worker(rank: int, world_size: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    work(*args)
