"""Token spans to sequences of one length, several documents in each.

Letters: B sequences, T tokens. Keeping documents apart in attention is the model's part: wherever
`position_ids` restart at 0, another document begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ot_ray.data.tokens import TokenSpan
from ot_ray.errors import ConfigError

IGNORE = -100
"""The label of a token that is not learnt, as Transformers' losses expect it."""

WINDOW = 8
"""Sequences that stay open for spans that must not be split."""


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of T tokens; all tensors have shape [T]."""

    input_ids: Tensor
    """int64 token ids."""

    position_ids: Tensor
    """int64; restart at 0 where a document, a part of one, or the padding begins."""

    labels: Tensor
    """int64, aligned with `input_ids` (Transformers shifts them inside); -100 where nothing is learnt,
    always so on the first token of a piece, which could only be predicted across the border."""

    real: Tensor
    """bool; False on padding."""


class OpenSequence:
    """A sequence of up to `length` tokens that takes further pieces."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._ids: list[int] = []
        self._learn: list[bool] = []
        self._pieces: list[int] = []

    @property
    def room(self) -> int:
        return self._length - len(self._ids)

    def add(self, ids: Sequence[int], learn: Sequence[bool]) -> None:
        self._ids += ids
        # The first token of a piece could only be predicted across the border.
        self._learn += [False, *learn[1:]]
        self._pieces.append(len(ids))

    def close(self, pad_id: int) -> PackedSequence | None:
        """The finished sequence, or None if it has nothing to learn."""
        if not any(self._learn):
            return None
        padding = self.room
        labels = [token if learnt else IGNORE for token, learnt in zip(self._ids, self._learn, strict=True)]
        positions = [position for size in [*self._pieces, padding] for position in range(size)]
        return PackedSequence(
            torch.tensor(self._ids + [pad_id] * padding),
            torch.tensor(positions),
            torch.tensor(labels + [IGNORE] * padding),
            torch.arange(self._length) < self._length - padding,
        )

    def state(self) -> dict[str, Any]:
        """What it holds, as JSON values."""
        return {"ids": list(self._ids), "learn": "".join("01"[flag] for flag in self._learn), "pieces": self._pieces[:]}

    @classmethod
    def of(cls, state: Mapping[str, Any], length: int) -> OpenSequence:
        """The sequence whose `state` this is.

        Raises:
            ValueError: it is not such a state, or does not fit the length.
        """
        sequence = cls(length)
        sequence._ids, sequence._pieces = list(state["ids"]), list(state["pieces"])
        sequence._learn = [flag == "1" for flag in state["learn"]]
        count = len(sequence._ids)
        if not 0 < count < length or len(sequence._learn) != count or sum(sequence._pieces) != count:
            raise ValueError(f"an open sequence of {count} tokens does not fit a length of {length}")
        return sequence


class Packer:
    """Packs spans one after another into sequences of `length` tokens, each handed out once it is finished.

    Splittable spans (plain text) fill sequences to the brim and go on in the next one. The others go
    whole into the first of at most `WINDOW` open sequences that has room; padding fills the rest. A
    sequence with nothing to learn is dropped.

    Args:
        open_sequences: the `OpenSequence.state` of each sequence that another packer left open.

    Raises:
        ConfigError: `length` is below 2.
        ValueError: `open_sequences` do not fit the length.
    """

    def __init__(self, length: int, pad_id: int, open_sequences: Iterable[Mapping[str, Any]] = ()) -> None:
        if length < 2:
            raise ConfigError(f"length is {length}: the first token of a sequence is never learnt; use 2 or more")
        self._length, self._pad_id = length, pad_id
        self._open = [OpenSequence.of(state, length) for state in open_sequences]

    @property
    def is_empty(self) -> bool:
        """Whether no sequence is open."""
        return not self._open

    def add(self, span: TokenSpan, start: int = 0) -> tuple[int, PackedSequence | None]:
        """Pack the tokens of a span from `start` on, until they are used up or a sequence is full.

        Returns:
            The token to go on from (the number of tokens, once they are used up), and a sequence that is
            finished and has something to learn, if there is one.

        Raises:
            ConfigError: a span that must not be split is longer than the sequences.
        """
        size = len(span.input_ids)
        if not span.splittable and size > self._length:
            raise ConfigError(
                f"a prompt or chat has {size} tokens, but sequences have {self._length}; "
                f"tokenize it with max_length={self._length}"
            )
        needed = 1 if span.splittable else size
        target = next((sequence for sequence in self._open if sequence.room >= needed), None)
        if target is None:
            target = OpenSequence(self._length)
            self._open.append(target)
        stop = min(start + target.room, size)
        target.add(span.input_ids[start:stop], span.learn[start:stop])
        finished = target if not target.room else None
        if finished is None and len(self._open) > WINDOW:
            finished = min(self._open, key=lambda sequence: sequence.room)
        return stop, self._close(finished)

    def flush(self) -> PackedSequence | None:
        """Close the sequence that has been open longest; None if it has nothing to learn or none is open."""
        return self._close(self._open[0] if self._open else None)

    def state(self) -> list[dict[str, Any]]:
        """The open sequences, as JSON values."""
        return [sequence.state() for sequence in self._open]

    def _close(self, sequence: OpenSequence | None) -> PackedSequence | None:
        if sequence is None:
            return None
        self._open.remove(sequence)
        return sequence.close(self._pad_id)


def pack(spans: Iterable[TokenSpan], length: int, pad_id: int) -> list[PackedSequence]:
    """Pack spans, in their order, as `Packer` does, to the end.

    Raises:
        ConfigError: `length` is below 2, or a span that must not be split is longer than `length`.
    """
    return list(packing(spans, length, pad_id))


def packing(spans: Iterable[TokenSpan], length: int, pad_id: int) -> Iterator[PackedSequence]:
    """The sequences of `pack` as they are finished; of the spans no more are taken than that needs."""
    packer = Packer(length, pad_id)
    for span in spans:
        start = 0
        while start < len(span.input_ids):
            start, finished = packer.add(span, start)
            if finished is not None:
                yield finished
    while not packer.is_empty:
        flushed = packer.flush()
        if flushed is not None:
            yield flushed


def collate(sequences: Sequence[PackedSequence]) -> dict[str, Tensor]:
    """Stack B sequences of one length into tensors of shape [B, T], one for each field, by its name."""
    fields = ("input_ids", "position_ids", "labels", "real")
    return {name: torch.stack([getattr(sequence, name) for sequence in sequences]) for name in fields}


def without_padding(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the columns at the end that are padding in every row; what the model says of real tokens stays.

    Args:
        batch: as `collate` makes it. One without `real` is given back as it is.
    """
    real = batch.get("real")
    if real is None:
        return dict(batch)
    # A sequence is real from its start on, so that the longest row says where the last real column is.
    length = max(int(real.sum(1).max()), 1)
    return {name: tensor[:, :length] for name, tensor in batch.items()}
