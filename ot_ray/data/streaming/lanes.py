"""One row of every global batch: tokenises and packs the documents dealt to it, and knows where it is.

Which documents those are is `dealing`'s part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ot_ray.config import Config
from ot_ray.data.load import pad_id, teaches
from ot_ray.data.packing import PackedSequence, Packer
from ot_ray.data.streaming.dealing import Deal, Dealer, Position, Window
from ot_ray.data.tokens import TokenSpan, tokenize
from ot_ray.errors import DataError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IDLE_PASSES = 8
"""A row that has found nothing to learn for longer will find nothing."""

_ANOTHER = "resume from another checkpoint, or start a new run"


class OpenState(Config):
    """A sequence that is not full; see `OpenSequence.state`."""

    ids: list[int]
    learn: str
    pieces: list[int]


class Cursor(Config):
    """Where a lane is after one of its samples."""

    samples: int = Field(default=0, ge=0)
    """Sequences that it has given."""
    position: Position = Position()
    """Where its window starts."""
    window: int = Field(default=0, ge=0)
    """The window's number in the pass."""
    taken: int = Field(default=0, ge=0)
    """Documents of the window that are used up."""
    tokens: int = Field(default=0, ge=0)
    """Tokens of the next document that are used up."""
    idle: int = Field(default=0, ge=0)
    """Passes that have ended since a document had something to learn."""
    dry: bool = False
    """Whether all documents of all passes are used up; only open sequences may be left."""
    open: tuple[OpenState, ...] = ()
    """Sequences that are not full."""

    @field_validator("position")
    @classmethod
    def _position_exists(cls, position: Position) -> Position:
        if min(position) < 0 or position.number < 1:
            raise ValueError("lies before the beginning")
        return position


@dataclass(frozen=True)
class Setup:
    """What lanes are made of, apart from their cursors; travels to worker processes."""

    deal: Deal
    tokenizer: PreTrainedTokenizerBase
    length: int
    """Tokens of a sequence."""


@dataclass(frozen=True)
class Task:
    """What a process that makes some rows of every batch is told."""

    setup: Setup
    cursors: Mapping[int, Cursor]
    """Where each of its lanes begins."""


class Lane:
    """The samples of one row, in their order.

    Raises:
        TrainingError: the cursor does not fit the length.
    """

    def __init__(self, number: int, setup: Setup, dealer: Dealer, cursor: Cursor) -> None:
        self._number, self._setup, self._dealer = number, setup, dealer
        try:
            open_sequences = [state.model_dump() for state in cursor.open]
            self._packer = Packer(setup.length, pad_id(setup.tokenizer), open_sequences)
        except ValueError as error:
            raise TrainingError(f"the data position of row {number} does not fit: {error}; {_ANOTHER}") from None
        self._cursor = cursor
        self._window: Window | None = None
        self._order: list[int] = []
        self._samples, self._taken, self._tokens = cursor.samples, cursor.taken, cursor.tokens
        self._idle, self._dry = cursor.idle, cursor.dry
        self._span: TokenSpan | None = None

    def next(self) -> PackedSequence:
        """The next sample.

        Raises:
            DataError: the passes are over, a pass has nothing for this lane, or a document is not valid.
            TrainingError: the cursor does not fit the source.
        """
        sample = None
        while sample is None:
            span = self._next_span()
            sample = self._packed(span) if span else self._flushed()
        self._samples += 1
        return sample

    def cursor(self) -> Cursor:
        """Where the lane is now."""
        window = self._window
        return Cursor(
            samples=self._samples,
            position=window.start if window else self._cursor.position,
            window=window.number if window else self._cursor.window,
            taken=self._taken,
            tokens=self._tokens,
            idle=self._idle,
            dry=self._dry,
            open=tuple(OpenState(**state) for state in self._packer.state()),
        )

    def _packed(self, span: TokenSpan) -> PackedSequence | None:
        self._tokens, sample = self._packer.add(span, self._tokens)
        if self._tokens == len(span.input_ids):
            self._span, self._taken, self._tokens = None, self._taken + 1, 0
        return sample

    def _flushed(self) -> PackedSequence | None:
        deal = self._setup.deal
        if self._packer.is_empty:
            raise DataError(
                f"{deal.source.config.name} dries up: data.passes is {deal.passes}, which gives "
                f"{self._samples} batches of {deal.lanes}; raise data.passes, lower training.steps or add text"
            )
        return self._packer.flush()

    def _next_span(self) -> TokenSpan | None:
        """The document that is being packed, or None if the passes are over."""
        while self._span is None:
            if self._window is None or self._taken == len(self._order):
                if not self._turn():
                    return None
                continue
            file, record = self._window.documents[self._order[self._taken]]
            document = self._setup.deal.source.parse(file, record)
            span = tokenize(document, self._setup.tokenizer, self._setup.length)
            if self._tokens >= len(span.input_ids):
                raise self._changed()
            if teaches(span):
                self._span, self._idle = span, 0
            else:
                self._taken += 1
        return self._span

    def _turn(self) -> bool:
        """Go to the next window; False if there is none."""
        if self._dry:
            return False
        before = self._window
        if before is not None and before.total is not None:
            self._end_pass(before.total)
        window = self._dealer.window(self._number)
        if window is None:
            self._dry = True
            return False
        self._window, self._order = window, self._setup.deal.order(self._number, window)
        if before is not None:
            self._taken = 0
        elif self._taken > len(self._order):
            raise self._changed()
        return True

    def _end_pass(self, documents: int) -> None:
        deal = self._setup.deal
        if documents < deal.lanes:
            raise DataError(
                f"{deal.source.config.name}: {documents} documents do not fill training.batch_size, which is "
                f"{deal.lanes}: each row of a batch reads documents of its own; use a batch_size of "
                f"1..{max(documents, 1)} or add documents"
            )
        self._idle += 1
        if self._idle > _IDLE_PASSES or (self._idle == deal.passes and self._packer.is_empty):
            raise DataError(
                f"{deal.source.config.name}: none of the documents of row {self._number}, one of {deal.lanes}, has "
                "anything to learn within the length; check the data or raise the length"
            )

    def _changed(self) -> TrainingError:
        source = self._setup.deal.source.config.name
        return TrainingError(f"{source} is not what it was when the checkpoint was written; {_ANOTHER}")


class Share:
    """Some of the rows of every batch, which one process makes."""

    def __init__(self, task: Task) -> None:
        starts = {lane: (cursor.position, cursor.window) for lane, cursor in task.cursors.items() if not cursor.dry}
        dealer = Dealer(task.setup.deal, starts)
        self._lanes = {number: Lane(number, task.setup, dealer, cursor) for number, cursor in task.cursors.items()}

    def batch(self) -> tuple[list[PackedSequence], dict[str, Any]]:
        """The next sample of each lane, in the order of the lanes, and the lanes' cursors after them.

        Raises:
            DataError, TrainingError: as `Lane.next`.
        """
        samples = [lane.next() for lane in self._lanes.values()]
        return samples, {str(number): lane.cursor().model_dump(mode="json") for number, lane in self._lanes.items()}
