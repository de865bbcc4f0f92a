"""Packed sequences to batches: one endless order that any number of processes can share and resume.

The loop that asks for batches, and the checkpoint that keeps the position, belong to training."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

from ot_ray.data.packing import PackedSequence, collate
from ot_ray.errors import ConfigError, DataError, TrainingError


class BatchStream:
    """Batches without end; each epoch shows every sequence once, in an order of its own.

    The position is the number of sequences consumed by all processes together, so the global batches
    are the same whatever the number of processes, and a run may resume with another number.

    Args:
        sequences: what `pack` made; all processes hold the same.
        batch_size: sequences in a global batch.
        seed: with the epoch's number, decides the order.

    Raises:
        DataError: there are no sequences.
        ConfigError: `batch_size` is below 1.
    """

    def __init__(self, sequences: Sequence[PackedSequence], batch_size: int, seed: int) -> None:
        if not sequences:
            raise DataError("there are no sequences to make batches of; check the data source")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; use 1 or more")
        self._sequences = sequences
        self._batch_size = batch_size
        self._seed = seed
        self._position = 0
        self._epoch = -1
        self._order: list[int] = []

    def next_batch(self, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """This rank's rows of the next global batch, which crosses an epoch's border where it must.

        Every rank calls this once for each batch. Ranks in order hold the global batch's rows in order.

        Returns:
            `collate`'s tensors of shape [batch_size / world_size, T].

        Raises:
            ConfigError: `batch_size` does not divide by `world_size`, or there is no such rank.
        """
        if world_size < 1 or self._batch_size % world_size:
            raise ConfigError(
                f"batch_size is {self._batch_size}, which does not divide by world_size {world_size}; "
                "change one of them"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; with world_size {world_size} use 0..{world_size - 1}")
        share = self._batch_size // world_size
        first = self._position + rank * share
        rows = [self._sequences[self._index(place)] for place in range(first, first + share)]
        self._position += self._batch_size
        return collate(rows)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the number of sequences consumed, the same on every rank."""
        return {"position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken.

        Raises:
            TrainingError: `state` is not one that `state` returned.
        """
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise TrainingError(
                f"the checkpoint's data position is {position!r}, not a count of sequences; "
                "resume from another checkpoint"
            )
        self._position = position

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._sequences))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._sequences)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._order[offset]
