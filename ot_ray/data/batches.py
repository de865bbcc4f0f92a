"""Batches by rank: what every source of batches promises, and packed sequences in memory as one.

The loop that asks for batches, and the checkpoint that keeps the position, belong to training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ot_ray.data.order import EpochOrder
from ot_ray.data.packing import PackedSequence, collate
from ot_ray.errors import ConfigError, DataError, TrainingError


class Batches(Protocol):
    """Global batches whose rows the ranks share; the same batches for any number of ranks."""

    def next_batch(self, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """This rank's rows of the next global batch, those of `rows_of`. Every rank calls it for each batch.

        Returns:
            Of text, int64 `input_ids`, `position_ids` and `labels`, and bool `real`, of shape [rows, T]; of images,
            float32 `pixel_values` [rows, channels, height, width] and int64 `labels` [rows].
        """
        ...

    def state(self) -> dict[str, Any]:
        """What this rank knows of the position after the last batch that it was given, as JSON values."""
        ...

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where a run of any number of ranks was: `states` are those of all of its ranks.

        Raises:
            TrainingError: the states are not such states, or do not fit.
        """
        ...

    def close(self) -> None:
        """Free what the batches hold; a second call does nothing."""
        ...


def rows_of(batch_size: int, rank: int, world_size: int) -> range:
    """The rows of a global batch that a rank has: contiguous, and the first ranks have one more where it
    does not divide.

    Raises:
        ConfigError: there is no such rank, or more ranks than rows.
    """
    if world_size < 1 or batch_size < world_size:
        raise ConfigError(
            f"batch_size is {batch_size}, which leaves ranks without a row at world_size {world_size}; "
            "raise batch_size or use fewer workers"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}; with world_size {world_size} use 0..{world_size - 1}")
    share, more = divmod(batch_size, world_size)
    first = rank * share + min(rank, more)
    return range(first, first + share + (rank < more))


def position_in(states: Sequence[Mapping[str, Any]]) -> int:
    """The number of examples consumed, from the states of all ranks, which are equal, so that the first counts.

    Raises:
        TrainingError: there is none, or it is not one that `BatchStream.state` returned.
    """
    position = states[0].get("position") if states else None
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
        raise TrainingError(
            f"the checkpoint's data position is {position!r}, not a count of sequences; resume from another checkpoint"
        )
    return position


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
        self._order = EpochOrder(len(sequences), seed)
        self._position = 0

    def next_batch(self, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """This rank's rows of the next global batch, which crosses an epoch's border where it must.

        Every rank calls this once for each batch. Ranks in order hold the global batch's rows in order.

        Returns:
            `collate`'s tensors of shape [rows, T].

        Raises:
            ConfigError: `batch_size` is below `world_size`, or there is no such rank.
        """
        rows = rows_of(self._batch_size, rank, world_size)
        sequences = [self._sequences[self._order.at(self._position + row)] for row in rows]
        self._position += self._batch_size
        return collate(sequences)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the number of sequences consumed, the same on every rank."""
        return {"position": self._position}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the states were taken; all ranks' are equal, so the first counts.

        Raises:
            TrainingError: there is none, or it is not one that `state` returned.
        """
        self._position = position_in(states)

    def close(self) -> None:
        """Nothing to free: the sequences are the caller's."""
