"""Whose turn it is: requests that wait for rows of the batch, in rotation over those who ask and over their requests.

What a request is, and whether it can begin, is the caller's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

# An asker may fill the queue up to this many times what it leaves free for others.
_GREED = 7


class Turns(Generic[Item]):
    """A bounded queue. Every asker gets one turn before any gets a second, and so do an asker's requests.

    Args:
        capacity: the most requests that wait at once.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._askers: OrderedDict[str, list[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._askers.values()))

    def __iter__(self) -> Iterator[Item]:
        for items in self._askers.values():
            yield from items

    def add(self, asker: str, item: Item) -> bool:
        """Queue a request; False if there is no room, or if all the room that is left is for others."""
        own = len(self._askers.get(asker, ()))
        if own >= _GREED * (self._capacity - len(self)):
            return False
        self._askers.setdefault(asker, []).append(item)
        return True

    def next(self, may_begin: Callable[[Item], bool]) -> Item | None:
        """The request whose turn it is among those that may begin; it stays in the queue, behind all others."""
        for asker, items in self._askers.items():
            for place, item in enumerate(items):
                if may_begin(item):
                    items.append(items.pop(place))
                    self._askers.move_to_end(asker)
                    return item
        return None

    def remove(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Take requests out, and return them."""
        gone = [item for item in self if wanted(item)]
        if gone:
            for asker, items in list(self._askers.items()):
                items[:] = [item for item in items if not any(item is other for other in gone)]
                if not items:
                    del self._askers[asker]
        return gone
