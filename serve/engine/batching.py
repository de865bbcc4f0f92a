"""Continuous batching: one thread over the model, which requests join when there is room and leave when they are done.

What a row is, and a step, is batch.py's part, and who joins admission.py's. Transformers' ContinuousBatchingManager is
no base for this: it lays all rows end to end in one row, so that a module cannot tell whose tokens it is given; it has
no biases, penalties or seeds by request; and its paged attention passes BLOOM's alibi by."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from serve.engine.admission import Admission, BatchLimits
from serve.engine.batch import Batch
from serve.engine.choice import GrowingChoice
from serve.engine.job import Job, Ticket, Told, lost
from serve.engine.residency import PlugInCache

_log = logging.getLogger(__name__)
T = TypeVar("T")

# How long the thread waits for another request before it ends.
_LINGER_S = 2.0
_SPEED_S = 10.0


@dataclass(frozen=True)
class EngineStats:
    """What an engine does at the moment, and what it did so far."""

    rows: int
    waiting: int
    """Requests that wait for rows, and rows that were put off."""
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
        self._batch, self._cache = batch, cache
        self._admission = Admission(cache, limits, start_choice, self.wake)
        self._news = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._stirred = False
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
        self._admission.add(ticket, asker)
        try:
            self.wake()
        except RuntimeError:
            # No thread can be started: nobody would ever take it from the queue.
            self._admission.remove(ticket)
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
            waiting=self._admission.waiting,
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
                    row.ticket.fail(lost(error))
                self._batch.clear()
                # Others may have waited for the room.
                self._stirred = True

    def _wait_for_work(self) -> bool:
        with self._news:
            busy = self._stirred or len(self._batch) or self._admission.has_put_off
            if not busy and not self._news.wait_for(lambda: self._stirred, _LINGER_S):
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
        rows, before = self._admission.newcomers(self._batch.rows), len(self._batch)
        if rows:
            try:
                self._batch.join(rows)
            except BaseException as error:
                for row in rows:
                    row.ticket.fail(lost(error))
                raise
        elif len(self._batch):
            self._step()
        self._sweep()
        # There may be room for others now.
        self._stirred = self._stirred or bool(rows) or len(self._batch) < before
        self._measure()

    def _step(self) -> None:
        gone = {id(row) for row in self._admission.put_off(self._batch.rows)}
        if gone:
            self._batch.drop(lambda row: id(row) in gone)
        self._batch.step()

    def _sweep(self) -> None:
        """Forget what is over: rows, places in the queue, uses of adapters."""
        over = self._admission.forget([row.ticket for row in self._batch.rows])
        if over:
            self._batch.drop(lambda row: row.ticket in over)
            self._admission.release(over)
            # Somebody may have waited for the room.
            self._stirred = True

    def _measure(self) -> None:
        now = time.monotonic()
        if now - self._speed[-1][0] >= 1.0:
            with self._news:
                self._speed.append((now, self._batch.tokens))
                while now - self._speed[0][0] > _SPEED_S and len(self._speed) > 1:
                    self._speed.popleft()
