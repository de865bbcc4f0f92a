"""Continuous batching: one thread over the model, which requests join when there is room and leave when they are done.

What a row is, and a step, is batch.py's part. Transformers' ContinuousBatchingManager is no base for this: it lays all
rows end to end in one row, so that a module cannot tell whose tokens it is given; it has no biases, penalties or seeds
by request; and its paged attention passes BLOOM's alibi by."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ot_ray.errors import NotFoundError
from serve.engine.batch import PREFILL, Batch
from serve.engine.choice import GrowingChoice
from serve.engine.job import Job, Row, Ticket, Told
from serve.engine.residency import PlugInCache
from serve.engine.turns import Turns
from serve.failures import ApiError, model_not_found

_log = logging.getLogger(__name__)
T = TypeVar("T")

# How long the thread waits for another request before it ends.
_LINGER_S = 2.0
# How long a request that doesn't fit beside others lets them pass.
_PATIENCE_S = 1.0
_SPEED_S = 10.0


@dataclass(frozen=True)
class BatchLimits:
    """How much is generated at once."""

    rows: int = 32
    """Choices in the batch."""
    tokens: int = 65_536
    """Rows times the tokens of the longest, at the time when that is most; a single row may have more."""
    waiting: int = 256
    """Requests that wait for rows."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine does at the moment, and what it did so far."""

    rows: int
    waiting: int
    tokens: int
    steps: int
    tokens_per_s: float
    """Over the last ten seconds or so."""
    adapters: int
    """On the device."""
    hits: dict[str, int]
    """Where adapters were found: on the device, on the host, or in the store."""


class Batcher:
    """Runs jobs in one batch. All methods may be called from any thread; the thread of the loop comes and goes.

    Args:
        start_choice: a choice of a job, by number, before its first token.
    """

    def __init__(
        self,
        batch: Batch,
        cache: PlugInCache,
        limits: BatchLimits,
        start_choice: Callable[[Job, int], GrowingChoice],
    ) -> None:
        self._batch, self._cache, self._limits, self._start_choice = batch, cache, limits, start_choice
        self._news = threading.Condition()
        self._turns: Turns[Ticket] = Turns(limits.waiting)
        self._held: list[Ticket] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._stirred = False
        self._blocked: tuple[Ticket, float] | None = None
        self._speed: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def submit(self, job: Job, tell: Callable[[Told], None], asker: str = "") -> Ticket:
        """Queue a job.

        Args:
            tell: hears the answer, as `Ticket` says.
            asker: who takes turns with others.

        Raises:
            ApiError: 429, too many requests wait.
        """
        ticket = Ticket(job, tell, self.wake)
        with self._news:
            if not self._turns.add(asker, ticket):
                raise ApiError(
                    f"{len(self._turns)} requests wait for the model; try again later.",
                    429,
                    "overloaded",
                    retry_after_s=2,
                )
        try:
            self.wake()
        except RuntimeError:
            # No thread can be started: nobody would ever take it from the queue.
            with self._news:
                self._turns.remove(lambda other: other is ticket)
            raise
        return ticket

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have the loop's thread do something between two steps."""
        done: Future[T] = Future()
        with self._news:
            self._calls.append((work, done))
        self.wake()
        return done

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        with self._news:
            (then, before), now = self._speed[0], time.monotonic()
            return EngineStats(
                rows=len(self._batch),
                waiting=len(self._turns),
                tokens=self._batch.tokens,
                steps=self._batch.steps,
                tokens_per_s=(self._batch.tokens - before) / max(now - then, 0.001),
                adapters=len(self._cache.resident()),
                hits=dict(self._cache.hits),
            )

    def wake(self) -> None:
        """Have the loop look again at what there is to do."""
        with self._news:
            self._stirred = True
            if self._thread is None:
                thread = threading.Thread(target=self._loop, name="batch", daemon=True)
                thread.start()
                self._thread = thread
            self._news.notify_all()

    def _loop(self) -> None:
        while self._wait_for_work():
            try:
                self._pass()
            except BaseException as error:
                _log.exception("a step of the batch failed; its requests end")
                for row in self._batch.rows:
                    row.ticket.fail(_lost(error))
                self._batch.clear()

    def _wait_for_work(self) -> bool:
        with self._news:
            if not (self._stirred or len(self._batch)) and not self._news.wait_for(lambda: self._stirred, _LINGER_S):
                self._thread = None
                return False
            self._stirred = False
            return True

    def _pass(self) -> None:
        while self._calls:
            work, done = self._calls.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
        self._sweep()
        rows, before = self._newcomers(), len(self._batch)
        if rows:
            try:
                self._batch.join(rows)
            except BaseException as error:
                for row in rows:
                    row.ticket.fail(_lost(error))
                raise
        elif len(self._batch):
            self._batch.step()
        self._sweep()
        # There may be room for others now.
        self._stirred = self._stirred or bool(rows) or len(self._batch) < before
        self._measure()

    def _sweep(self) -> None:
        """Forget what is over: rows, places in the queue, uses of adapters."""
        with self._news:
            # Looked at once: one that is cancelled meanwhile keeps its adapter until its rows are gone too.
            over = {ticket for ticket in (*self._held, *self._turns, *self._running()) if ticket.over}
            if not over:
                return
            for ticket in self._turns.remove(over.__contains__):
                if ticket.resident is None and ticket.job.plug_in is not None:
                    self._cache.give_up(ticket.job.plug_in)
        self._batch.drop(lambda row: row.ticket in over)
        for ticket in over.intersection(self._held):
            assert ticket.resident is not None
            self._cache.release(ticket.resident)
        self._held = [ticket for ticket in self._held if ticket not in over]
        # Somebody may have waited for the room.
        self._stirred = True

    def _running(self) -> list[Ticket]:
        return [row.ticket for row in self._batch.rows]

    def _newcomers(self) -> list[Row]:
        """The choices whose turn it is, as many as there is room for and may be read at once."""
        rows: list[Row] = []
        if not len(self._turns):
            return rows
        while len(self._batch) + len(rows) < self._limits.rows and sum(len(row.prompt) for row in rows) < PREFILL:
            with self._news:
                ticket = self._turns.next(lambda ticket: self._may_begin(ticket, rows))
                if ticket is None:
                    break
                index, ticket.next_choice = ticket.next_choice, ticket.next_choice + 1
                if ticket.next_choice == ticket.job.choices:
                    self._turns.remove(lambda other, done=ticket: other is done)
            ticket.begin()
            try:
                rows.append(Row(ticket, index, self._start_choice(ticket.job, index)))
            except Exception as error:
                _log.exception("a choice cannot be begun; its request ends")
                ticket.fail(_lost(error))
        return rows

    def _may_begin(self, ticket: Ticket, rows: list[Row]) -> bool:
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
        if not self._fits(ticket, rows):
            self._blocked = blocked or (ticket, time.monotonic())
            return False
        return True

    def _fits(self, ticket: Ticket, rows: list[Row]) -> bool:
        job, together = ticket.job, [*self._batch.rows, *rows]
        needs = [(len(row.prompt) + row.made, row.ticket.job.max_tokens - row.made) for row in together]
        needs.append((len(job.prompts[ticket.next_choice // job.n]), job.max_tokens))
        return not together or most_cells(needs) <= self._limits.tokens

    def _has_adapter(self, ticket: Ticket) -> bool:
        """Whether a ticket's adapter is on the device; if there is room for it, it is loaded meanwhile."""
        if ticket.job.plug_in is None:
            return True
        if ticket.resident is None:
            ticket.resident = self._cache.try_hold(ticket.job.plug_in)
            if ticket.resident is None:
                return False
            self._held.append(ticket)
            ticket.resident.model.add_done_callback(lambda _: self.wake())
        loaded = ticket.resident.model
        if not loaded.done():
            return False
        error = loaded.exception()
        if error is not None:
            # Each that waited for this load hears an error of its own.
            ticket.fail(model_not_found(ticket.job.model) if isinstance(error, NotFoundError) else _own(error))
            self._stirred = True
            return False
        return True

    def _measure(self) -> None:
        now = time.monotonic()
        if now - self._speed[-1][0] >= 1.0:
            with self._news:
                self._speed.append((now, self._batch.tokens))
                while now - self._speed[0][0] > _SPEED_S and len(self._speed) > 1:
                    self._speed.popleft()


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
        return _lost(error)


def _lost(error: BaseException) -> ApiError:
    """What a request hears that ended with a step's failure, an object of its own."""
    lost = ApiError("The model failed while it answered; try again.", 500)
    lost.__cause__ = error
    return lost
