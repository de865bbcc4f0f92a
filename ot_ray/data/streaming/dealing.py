"""Deals the documents of a source to lanes, one lane for each row of the global batch, window by window.

What a lane makes of its documents is `lanes`' part."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ot_ray.data.documents import Source
from ot_ray.data.readers import BEGINNING, Place, Record

WINDOW_BYTES = 1 << 21
"""A window is full at this size, however few its documents."""

WAITING_BYTES = 1 << 26
"""What may wait for one lane while others are ahead of it; beyond, the lane reads for itself."""


class Position(NamedTuple):
    """Where a document stands in the passes over a source."""

    pass_number: int = 0
    before: int = 0
    """Documents of the pass before it."""
    file: int = 0
    """Place of its file in the order of the pass."""
    number: int = 1
    """Of the line, row or part in the file, from 1."""
    offset: int = 0
    """Byte in the file where it begins; kept for lines only."""


@dataclass(frozen=True)
class Window:
    """Consecutive documents of one lane in one pass; they are shuffled together."""

    number: int
    """In the lane and the pass, from 0."""
    start: Position
    """Of the first document."""
    documents: list[tuple[int, Record]]
    """File numbers of the source, and what stands there."""
    total: int | None
    """Documents in the whole pass, known where this window is the lane's last of it."""

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return sum(record.size for _, record in self.documents)


class Dealt(NamedTuple):
    """A document, or, without a record, the end of a pass."""

    position: Position
    file: int
    record: Record | None


@dataclass(frozen=True)
class Deal:
    """All that decides which lane gets which document when. Knows nothing of ranks, so any number can share it."""

    source: Source
    seed: int
    lanes: int
    """Rows of the global batch."""
    shuffle_window: int
    """Documents in a window."""
    passes: int
    longest: int
    """Characters of a text file's documents before they are cut."""

    def lane_of(self, position: Position) -> int:
        """Round robin; shifted from pass to pass, so that one long document is not always the same lane's."""
        return (position.before + position.pass_number) % self.lanes

    def order(self, lane: int, window: Window) -> list[int]:
        """In which order the lane takes the documents of a window."""
        order = list(range(len(window.documents)))
        if self.shuffle_window > 1:
            random.Random(f"{self.seed}/{window.start.pass_number}/{lane}/{window.number}").shuffle(order)
        return order

    def documents(self, start: Position) -> Iterator[Dealt]:
        """All documents of all passes from a position on, with the end of each pass."""
        for pass_number in range(start.pass_number, self.passes):
            files = self._files(pass_number)
            limit = self.source.config.limit
            most = None if limit is None else limit - start.before
            index = start.before
            for dealt in itertools.islice(self._pass(files, start._replace(pass_number=pass_number)), most):
                yield dealt
                index += 1
            yield Dealt(Position(pass_number, index, len(files)), 0, None)
            start = Position()

    def _pass(self, files: list[int], start: Position) -> Iterator[Dealt]:
        index, place = start.before, Place(start.number, start.offset)
        for file in range(start.file, len(files)):
            for record in self.source.records(files[file], place, self.longest):
                yield Dealt(Position(start.pass_number, index, file, *record.place), files[file], record)
                index += 1
            place = BEGINNING

    def _files(self, pass_number: int) -> list[int]:
        files = list(range(self.source.count))
        # A limit means the same documents in every pass.
        if self.source.config.limit is None and self.shuffle_window > 1:
            random.Random(f"{self.seed}/{pass_number}").shuffle(files)
        return files


class Dealer:
    """Reads the source once for several lanes and hands each its windows as it asks for them.

    Args:
        starts: for each lane the position and number of the window that it begins with.
    """

    def __init__(self, deal: Deal, starts: Mapping[int, tuple[Position, int]]) -> None:
        self._deal = deal
        self._hands = {lane: _Hand(position, window) for lane, (position, window) in starts.items()}
        reader = _Reader(deal, dict(self._hands))
        self._readers = dict.fromkeys(self._hands, reader)

    def window(self, lane: int) -> Window | None:
        """The next window of a lane, or None after its last of all passes.

        Raises:
            DataError, MissingDependencyError: as the readers do.
        """
        hand = self._hands[lane]
        while not hand.ready:
            if lane not in self._readers[lane].hands:
                self._readers[lane] = _Reader(self._deal, {lane: hand})
            if not self._readers[lane].advance():
                return None
        window = hand.ready.popleft()
        hand.waiting -= window.size
        return window


class _Hand:
    """What a lane has been dealt and has not taken."""

    def __init__(self, start: Position, window: int) -> None:
        self.origin = start
        """Where reading must start to find its next document."""
        self.begin = start[:2]
        """Pass and index of the first document that it may get."""
        self.ready: deque[Window] = deque()
        self.waiting = 0
        self._number = window
        self._start: Position | None = None
        self._documents: list[tuple[int, Record]] = []
        self._size = 0

    def take(self, dealt: Dealt, record: Record, most: int) -> bool:
        """Add a document; returns whether that completed a window."""
        self._start = self._start or dealt.position
        self._documents.append((dealt.file, record))
        self._size += record.size
        if len(self._documents) < most and self._size < WINDOW_BYTES:
            return False
        self._complete(self._start, None)
        return True

    def end_pass(self, position: Position) -> None:
        self._complete(self._start or position, position.before)
        self._number = 0

    def _complete(self, start: Position, total: int | None) -> None:
        self.ready.append(Window(self._number, start, self._documents, total))
        self.waiting += self._size
        self._number, self._start, self._documents, self._size = self._number + 1, None, [], 0


class _Reader:
    """Goes through the source from where the hindmost of its hands begins."""

    def __init__(self, deal: Deal, hands: dict[int, _Hand]) -> None:
        self.hands = hands
        self._deal = deal
        self._documents = deal.documents(min((hand.origin for hand in hands.values()), default=Position()))

    def advance(self) -> bool:
        """Deal one document; returns whether there was one, or the end of a pass."""
        dealt = next(self._documents, None)
        if dealt is None:
            return False
        here = dealt.position[:2]
        if dealt.record is None:
            for hand in self.hands.values():
                if hand.begin <= here:
                    hand.end_pass(dealt.position)
            return True
        lane = self._deal.lane_of(dealt.position)
        hand = self.hands.get(lane)
        if hand is None or here < hand.begin:
            return True
        if hand.take(dealt, dealt.record, self._deal.shuffle_window) and hand.waiting > WAITING_BYTES:
            del self.hands[lane]
            hand.origin, hand.begin = dealt.position, (here[0], here[1] + 1)
        return True
