"""Token spans to sequences of one length, several documents in each.

Letters: B sequences, T tokens. Keeping documents apart in attention is the model's part: wherever
`position_ids` restart at 0, another document begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


class _OpenSequence:
    def __init__(self, length: int) -> None:
        self._length = length
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._labels: list[int] = []

    @property
    def room(self) -> int:
        return self._length - len(self._ids)

    def add(self, ids: Sequence[int], learn: Sequence[bool]) -> None:
        self._ids += ids
        self._positions += range(len(ids))
        labels = [token if learnt else IGNORE for token, learnt in zip(ids, learn, strict=True)]
        self._labels += [IGNORE, *labels[1:]]

    def close(self, pad_id: int) -> PackedSequence | None:
        """The finished sequence, or None if it has nothing to learn."""
        if all(label == IGNORE for label in self._labels):
            return None
        padding = self.room
        return PackedSequence(
            torch.tensor(self._ids + [pad_id] * padding),
            torch.tensor(self._positions + list(range(padding))),
            torch.tensor(self._labels + [IGNORE] * padding),
            torch.arange(self._length) < self._length - padding,
        )


def pack(spans: Iterable[TokenSpan], length: int, pad_id: int) -> list[PackedSequence]:
    """Pack spans, in their order, into sequences of `length` tokens.

    Splittable spans (plain text) fill sequences to the brim and go on in the next one. The others go
    whole into the first of at most `WINDOW` open sequences that has room; padding fills the rest. A
    sequence with nothing to learn is dropped.

    Raises:
        ConfigError: `length` is below 2, or a span that must not be split is longer than `length`.
    """
    if length < 2:
        raise ConfigError(f"length is {length}: the first token of a sequence is never learnt; use 2 or more")
    window: list[_OpenSequence] = []
    closed: list[_OpenSequence] = []
    for span in spans:
        place = _pour if span.splittable else _place_whole
        place(span, length, window)
        closed += [sequence for sequence in window if not sequence.room]
        window = [sequence for sequence in window if sequence.room]
        if len(window) > WINDOW:
            fullest = min(window, key=lambda sequence: sequence.room)
            window.remove(fullest)
            closed.append(fullest)
    finished = (sequence.close(pad_id) for sequence in [*closed, *window])
    return [sequence for sequence in finished if sequence is not None]


def collate(sequences: Sequence[PackedSequence]) -> dict[str, Tensor]:
    """Stack B sequences of one length into tensors of shape [B, T], one for each field, by its name."""
    fields = ("input_ids", "position_ids", "labels", "real")
    return {name: torch.stack([getattr(sequence, name) for sequence in sequences]) for name in fields}


def _pour(span: TokenSpan, length: int, window: list[_OpenSequence]) -> None:
    start = 0
    while start < len(span.input_ids):
        target = next((sequence for sequence in window if sequence.room), None)
        if target is None:
            target = _OpenSequence(length)
            window.append(target)
        stop = start + target.room
        target.add(span.input_ids[start:stop], span.learn[start:stop])
        start = stop


def _place_whole(span: TokenSpan, length: int, window: list[_OpenSequence]) -> None:
    size = len(span.input_ids)
    if size > length:
        raise ConfigError(
            f"a prompt or chat has {size} tokens, but sequences have {length}; tokenize it with max_length={length}"
        )
    target = next((sequence for sequence in window if sequence.room >= size), None)
    if target is None:
        target = _OpenSequence(length)
        window.append(target)
    target.add(span.input_ids, span.learn)
