"""The order in which epochs show a set of examples: each once an epoch, shuffled by the seed and the epoch's number."""

from __future__ import annotations

import random


class EpochOrder:
    """Which example stands at each place of an endless run through `count` examples."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch = -1
        self._order: list[int] = []

    def at(self, place: int) -> int:
        """The example at a place, both counted from 0."""
        epoch, offset = divmod(place, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(self._count))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._order[offset]
