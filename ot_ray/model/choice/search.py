"""Searching sets of layers with few measurements: by what each layer adds alone, corrected by what is measured.

Knows nothing of models: a measurement is a vector, and the shortest one wins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ot_ray.model.emulator import uniform_layers

_BEAM = 64


def best_kept(count: int, keep: int, measure: Callable[[Sequence[int]], Tensor]) -> list[int]:
    """Find a set of `keep` of `count` layers whose measurement is short.

    All sets are measured where there are at most 2·count. Otherwise each layer is left out alone (count
    measurements); the sum of what the left-out layers add predicts the measurement of a set, and a beam search finds
    the sets for which it is short. Up to 2·count sets are measured: the uniform one, the best predictions, and from
    the shortest so far on those that differ from it by one layer, the best prediction first, each time corrected by
    what was measured.

    Args:
        measure: the difference that a set makes, [V]; of the set of all layers it is nought.

    Returns:
        Ascending; never longer than the uniform set, the first in order among equals.
    """
    most = 2 * count
    if math.comb(count, keep) <= most:
        lengths = {kept: _square(measure(kept)) for kept in itertools.combinations(range(count), keep)}
        return list(min(lengths, key=lambda kept: (lengths[kept], kept)))
    alone = torch.stack([measure([i for i in range(count) if i != left_out]) for left_out in range(count)])
    climb = _Climb(alone, measure, tuple(uniform_layers(count, keep)))
    for kept in _promising(alone, keep)[: count // 2]:
        climb.try_set(kept)
    while climb.tried < most and (neighbour := climb.next_neighbour()) is not None:
        climb.try_set(neighbour)
    return list(climb.best)


class _Climb:
    """The shortest set so far, and which of its neighbours is expected to be shorter."""

    def __init__(self, alone: Tensor, measure: Callable[[Sequence[int]], Tensor], start: tuple[int, ...]) -> None:
        self._alone, self._products, self._measure = alone, (alone @ alone.T).double(), measure
        self._seen: set[tuple[int, ...]] = {start}
        self.best = start
        self._difference = measure(start)
        self._length = _square(self._difference)

    @property
    def tried(self) -> int:
        return len(self._seen)

    def try_set(self, kept: tuple[int, ...]) -> None:
        """Measure a set unless that was done."""
        if kept in self._seen:
            return
        self._seen.add(kept)
        difference = self._measure(kept)
        length = _square(difference)
        if length < self._length:
            self.best, self._difference, self._length = kept, difference, length

    def next_neighbour(self) -> tuple[int, ...] | None:
        """The set that is expected to be the shortest of those which differ from the best by one layer."""
        towards = (self._alone @ self._difference).double()
        own = self._products.diagonal()
        dropped = [i for i in range(len(own)) if i not in self.best]
        expected = {
            tuple(sorted({*self.best, back} - {out})): (
                2 * (towards[out] - towards[back]) + own[out] + own[back] - 2 * self._products[out, back]
            ).item()
            for out in self.best
            for back in dropped
        }
        unseen = expected.keys() - self._seen
        return min(unseen, key=lambda kept: (expected[kept], kept)) if unseen else None


def _promising(alone: Tensor, keep: int) -> list[tuple[int, ...]]:
    """Sets for which the sum of what the left-out layers add is short, the shortest first."""
    products, count = (alone @ alone.T).double(), len(alone)
    beam: list[tuple[int, ...]] = [()]
    for _ in range(count - keep):
        wider = {tuple(sorted({*out, i})) for out in beam for i in range(count) if i not in out}
        beam = sorted(wider, key=lambda out: (products[out, :][:, out].sum().item(), out))[:_BEAM]
    return [tuple(i for i in range(count) if i not in out) for out in beam]


def _square(vector: Tensor) -> float:
    """Its squared length; one that is not finite counts as endless."""
    square = vector.double().pow(2).sum().item()
    return square if math.isfinite(square) else math.inf
