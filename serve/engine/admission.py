"""Who joins the batch, and who leaves it for a while: rows are admitted by what they need soon, not by what they might.

Running the rows is batch.py's part, and the order of those that wait turns.py's."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from ot_ray.errors import NotFoundError
from serve.engine.batch import PREFILL
from serve.engine.choice import GrowingChoice
from serve.engine.job import Job, Row, Ticket, lost
from serve.engine.residency import PlugInCache
from serve.engine.turns import Turns
from serve.failures import ApiError, model_not_found

_log = logging.getLogger(__name__)

# How long a request that doesn't fit beside others lets them pass.
_PATIENCE_S = 1.0
# Tokens that every row must have room for when one joins: few answers are as long as their limit allows.
_AHEAD = 256


@dataclass(frozen=True)
class BatchLimits:
    """How much is generated at once."""

    rows: int = 32
    """Choices in the batch."""
    tokens: int = 65_536
    """Rows times the tokens of the longest; a single row may have more."""
    waiting: int = 256
    """Requests that wait for rows."""


class Admission:
    """The requests that wait, and the rows that were put off.

    A row joins if all rows have room for their next tokens. Where answers grow longer than that, the youngest rows are
    put off: they keep their tokens and come back, before anybody new, once there is room. The oldest row is never put
    off, so that each comes to its end. `add`, `remove` and `waiting` may be called from any thread, the rest from the
    batch's.

    Args:
        start_choice: a choice of a job, by number, before its first token.
        wake: has the batch's thread look again; called when an adapter is there.
    """

    def __init__(
        self,
        cache: PlugInCache,
        limits: BatchLimits,
        start_choice: Callable[[Job, int], GrowingChoice],
        wake: Callable[[], None],
    ) -> None:
        self._cache, self._limits, self._start_choice, self._wake = cache, limits, start_choice, wake
        self._lock = threading.RLock()
        self._turns: Turns[Ticket] = Turns(limits.waiting)
        self._held: list[Ticket] = []
        self._put_off: list[Row] = []
        self._blocked: tuple[Ticket, float] | None = None
        self._numbers = count()

    @property
    def waiting(self) -> int:
        """Requests that wait for rows, and rows that were put off."""
        with self._lock:
            return len(self._turns) + len(self._put_off)

    @property
    def has_put_off(self) -> bool:
        """Whether rows wait to come back."""
        return bool(self._put_off)

    def add(self, ticket: Ticket, asker: str) -> None:
        """Queue a request.

        Raises:
            ApiError: 429, too many wait.
        """
        with self._lock:
            if not self._turns.add(asker, ticket):
                raise ApiError(
                    f"{len(self._turns)} requests wait for the model; try again later.",
                    429,
                    "overloaded",
                    retry_after_s=2,
                )

    def remove(self, ticket: Ticket) -> None:
        """Take a request out of the queue."""
        with self._lock:
            self._turns.remove(lambda other: other is ticket)

    def forget(self, running: Iterable[Ticket]) -> set[Ticket]:
        """Forget those that are over, of the waiting, the put off and the running; the caller takes their rows out,
        and then calls `release`."""
        with self._lock:
            put_off = [row.ticket for row in self._put_off]
            # Looked at once: one that is cancelled meanwhile keeps its adapter until its rows are gone too.
            over = {ticket for ticket in (*self._held, *self._turns, *put_off, *running) if ticket.over}
            if over:
                self._put_off = [row for row in self._put_off if row.ticket not in over]
                for ticket in self._turns.remove(over.__contains__):
                    if ticket.resident is None and ticket.job.plug_in is not None:
                        self._cache.give_up(ticket.job.plug_in)
        return over

    def release(self, over: set[Ticket]) -> None:
        """End the uses of adapters by requests whose rows are gone."""
        for ticket in over.intersection(self._held):
            assert ticket.resident is not None
            self._cache.release(ticket.resident)
        self._held = [ticket for ticket in self._held if ticket not in over]

    def put_off(self, running: Sequence[Row]) -> list[Row]:
        """The youngest rows, as many as must leave for the others to have one more token each."""
        staying, gone = sorted(running, key=lambda row: row.number), []
        while len(staying) > 1 and len(staying) * max(row.length for row in staying) > self._limits.tokens:
            gone.append(staying.pop())
        if gone:
            for row in gone:
                row.reread()
            with self._lock:
                self._put_off = sorted([*self._put_off, *gone], key=lambda row: row.number)
        return gone

    def newcomers(self, running: Sequence[Row]) -> list[Row]:
        """The rows whose turn it is, as many as there is room for and may be read at once."""
        rows: list[Row] = []
        while self._put_off and self._has_place(running, rows):
            row = self._put_off[0]
            if not self._fits([*running, *rows], row.length, row.left):
                break
            with self._lock:
                self._put_off.pop(0)
            rows.append(row)
        while not self._put_off and len(self._turns) and self._has_place(running, rows):
            with self._lock:
                ticket = self._turns.next(lambda ticket: self._may_begin(ticket, [*running, *rows]))
                if ticket is None:
                    break
                index, ticket.next_choice = ticket.next_choice, ticket.next_choice + 1
                if ticket.next_choice == ticket.job.choices:
                    self.remove(ticket)
            ticket.begin()
            try:
                rows.append(Row(ticket, index, self._start_choice(ticket.job, index), next(self._numbers)))
            except Exception as error:
                _log.exception("a choice cannot be begun; its request ends")
                ticket.fail(lost(error))
        return rows

    def _has_place(self, running: Sequence[Row], rows: Sequence[Row]) -> bool:
        return len(running) + len(rows) < self._limits.rows and sum(len(row.read) for row in rows) < PREFILL

    def _may_begin(self, ticket: Ticket, together: list[Row]) -> bool:
        if ticket.over:
            return False
        blocked = self._blocked
        if blocked is not None and (blocked[0].over or blocked[0].next_choice):
            blocked = self._blocked = None
        if blocked is not None and blocked[0] is not ticket and time.monotonic() - blocked[1] > _PATIENCE_S:
            return False
        # One that keeps others out has its adapter already, so that what they hold cannot keep it from beginning.
        if not self._has_adapter(ticket):
            return False
        job = ticket.job
        if not self._fits(together, len(job.prompts[ticket.next_choice // job.n]), job.max_tokens):
            self._blocked = blocked or (ticket, time.monotonic())
            return False
        return True

    def _fits(self, together: list[Row], length: int, left: int) -> bool:
        """Whether one more row fits, which has so many tokens and may make so many more."""
        if not together:
            return True
        needs = [*((row.length, row.left) for row in together), (length, left)]
        return most_cells((has, min(more, _AHEAD)) for has, more in needs) <= self._limits.tokens

    def _has_adapter(self, ticket: Ticket) -> bool:
        """Whether a ticket's adapter is on the device; if there is room for it, it is loaded meanwhile."""
        if ticket.job.plug_in is None:
            return True
        if ticket.resident is None:
            ticket.resident = self._cache.try_hold(ticket.job.plug_in)
            if ticket.resident is None:
                return False
            self._held.append(ticket)
            ticket.resident.model.add_done_callback(lambda _: self._wake())
        loaded = ticket.resident.model
        if not loaded.done():
            return False
        error = loaded.exception()
        if error is not None:
            # Each that waited for this load hears an error of its own.
            ticket.fail(model_not_found(ticket.job.model) if isinstance(error, NotFoundError) else _own(error))
            self._wake()
            return False
        return True


def most_cells(needs: Iterable[tuple[int, int]]) -> int:
    """Rows times columns of the key-value cache when that is most, if nobody joins and every row makes all its tokens.

    Args:
        needs: of each row, the tokens that it has and those that it may still make.
    """
    longest = most = 0
    # Between two rows' ends the others grow only, so that it is most when one ends.
    for rows, (left, has) in enumerate(sorted(((left, has) for has, left in needs), reverse=True), 1):
        longest = max(longest, has)
        most = max(most, rows * (longest + left))
    return most


def _own(error: BaseException) -> BaseException:
    """An error as a new object, since each that raises one adds to it."""
    try:
        return copy.copy(error)
    except Exception:
        return lost(error)
