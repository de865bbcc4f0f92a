"""Several ranks in one process: each trains the whole batch on a model of its own, and keeps a share of its state.

Losses are equal bit for bit for any number of ranks, so that only checkpoints can make a difference."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ot_ray.training import TorchEngine, TrainingConfig
from ot_ray.training.shards import Piece, Read
from tests.training.samples import Dropped

T = TypeVar("T")

PATIENCE = 120.0
"""Seconds after which ranks that wait for each other count as stuck."""


def plain() -> nn.Module:
    """`Dropped` without its dropout: ranks in threads share one random state."""
    module = Dropped()
    module.net[2] = nn.Identity()
    return module


class Replica:
    """One rank; see `Engine`."""

    def __init__(self, rank: int, group: _Group, module: nn.Module, config: TrainingConfig) -> None:
        self._inner, self._group = TorchEngine(module, config, device="cpu"), group
        self.rank, self.world_size = rank, group.world_size
        self.module, self.device, self.local_loss = self._inner.module, self._inner.device, 0.0

    def step(self, batch: dict[str, Tensor], lr: float) -> dict[str, float]:
        with torch.no_grad():
            self.local_loss = float(self.module(**batch)["loss"])
        parts = self._group.exchange(self.rank, batch)
        return self._inner.step({name: torch.cat([part[name] for part in parts]) for name in batch}, lr)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        every = self._group.exchange(self.rank, values)
        return {name: sum(other[name] for other in every) / self.world_size for name in values}

    def gather(self, value: Any) -> list[Any]:
        return self._group.exchange(self.rank, json.loads(json.dumps(value)))

    def barrier(self) -> None:
        self.gather(None)

    def sizes(self) -> dict[str, int]:
        return self._inner.sizes()

    def pieces(self) -> Iterator[Piece]:
        for piece in self._inner.pieces():
            first, last = (piece.tensor.numel() * r // self.world_size for r in (self.rank, self.rank + 1))
            yield piece._replace(start=first, tensor=piece.tensor[first:last].clone())

    def restore(self, step: int, read: Read) -> None:
        self._inner.restore(step, read)

    def trainable_state(self) -> dict[str, Tensor]:
        return self._inner.trainable_state()


class _Group:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._said: dict[tuple[int, int], Any] = {}
        self._rounds, self._gone = [0] * world_size, False
        self._news = threading.Condition()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank said in this round; fails where a rank left before it said anything."""
        with self._news:
            turn = self._rounds[rank]
            self._rounds[rank] += 1
            self._said[turn, rank] = value
            self._news.notify_all()
            keys = [(turn, other) for other in range(self.world_size)]
            self._news.wait_for(lambda: self._gone or all(key in self._said for key in keys), PATIENCE)
            if not all(key in self._said for key in keys):
                raise ConnectionError("another rank has left")
            return [self._said[key] for key in keys]

    def leave(self) -> None:
        with self._news:
            self._gone = True
            self._news.notify_all()


def run_ranks(
    world_size: int,
    config: TrainingConfig,
    work: Callable[[Replica], T],
    make: Callable[[int], nn.Module] = lambda rank: plain(),
) -> list[T | BaseException]:
    """What `work` returned or raised on each rank. Whoever waits for a rank that raised is let go."""
    group, answers = _Group(world_size), [None] * world_size
    ranks = [Replica(rank, group, make(rank), config) for rank in range(world_size)]

    def run(rank: Replica) -> None:
        try:
            answers[rank.rank] = work(rank)  # type: ignore[call-overload]
        except BaseException as error:
            answers[rank.rank] = error  # type: ignore[call-overload]
            group.leave()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "ranks are stuck"
    return answers  # type: ignore[return-value]
