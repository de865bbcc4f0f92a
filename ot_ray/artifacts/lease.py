"""One run at a time: a lease in a store, kept by a heartbeat and taken over when the heartbeat stops.

Which work a lease guards is left to the caller."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

from pydantic import AwareDatetime, Field

from ot_ray.artifacts.manifest import now, to_text
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.config import Config
from ot_ray.errors import AlreadyExistsError, LeaseHeldError, LeaseLostError, NotFoundError, StoreError
from ot_ray.store import PatientStore, Store

Tell = Callable[[str], None]

_REMIND_S = 60.0  # between two messages to somebody who waits
_AGAIN_S = 2.0  # from a heartbeat that the store did not take to the next try, at most


class Holder(Config):
    """Who holds a lease: `leases/<name>/<generation>/holder.json`, created once."""

    holder: str
    """A random id."""
    host: str
    """The machine."""
    pid: int
    """The process there."""
    started: AwareDatetime
    """When the lease was taken, by the holder's clock, UTC."""
    ttl_s: float = Field(gt=0)
    """Seconds without a heartbeat after which others may take over."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started.isoformat()}"


class Lease:
    """A lease that this process holds; made by `hold_lease`."""

    def __init__(self, store: Store, name: str, generation: int, holder: Holder, heart: _Heart) -> None:
        self._store, self._name, self._generation, self._heart = store, name, generation, heart
        self.holder = holder

    @property
    def lost(self) -> bool:
        """Whether the last heartbeat found that another run has taken over; `require` looks anew."""
        return self._heart.lost

    def require(self) -> None:
        """Make sure, by looking into the store, that the lease is still held.

        Raises:
            LeaseLostError: another run has taken over.
        """
        if _newest(self._store, self._name) != self._generation:
            raise self._loss()

    @contextmanager
    def ending_with_it(self) -> Iterator[None]:
        """Have the loss of the lease end the block, as Ctrl-C would.

        Only the main thread can be interrupted, and only where it heeds Ctrl-C; elsewhere the block runs on.

        Raises:
            LeaseLostError: another run has taken over.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            try:
                self._heart.interrupts(True)
                yield
            finally:
                self._heart.interrupts(False)
                if self.lost:
                    time.sleep(0.01)  # an interrupt on its way arrives here, and not in the caller's next lines
        except BaseException as error:
            if self.lost:
                raise self._loss() from error
            raise
        if self.lost:
            raise self._loss()

    def _loss(self) -> LeaseLostError:
        return LeaseLostError(
            f"the lease on {self._name} in {self._store.url} was taken over by another run, because no heartbeat "
            f"of this one was seen for {self.holder.ttl_s:g} s; nothing more is published here: let the other run "
            "finish, or raise lease_ttl_s"
        )


@contextmanager
def hold_lease(
    store: Store,
    name: str,
    *,
    ttl_s: float = 120.0,
    wait: bool = False,
    renew_every_s: float | None = None,
    patience_s: float = 0.0,
    tell: Tell | None = None,
) -> Iterator[Lease]:
    """Hold the lease on `name` while the block runs.

    Each lease is a generation, created once; the newest one rules. A holder writes a heartbeat every third of
    `ttl_s`. Whoever finds a lease watches its heartbeat, by its own clock alone: a holder whose heartbeat changes
    is alive, and one whose heartbeat stays for the holder's own `ttl_s` is dead and is replaced. Time in which the
    watcher itself did not get an answer from the store says nothing of the holder: watching begins anew after it.

    Args:
        name: a key's segment, such as a model's name.
        wait: wait until a live holder ends, rather than leave.
        renew_every_s: seconds between heartbeats; unset, a third of `ttl_s`.
        patience_s: seconds that taking the lease and looking at it wait for a store that does not answer.
        tell: takes messages for the person who waits; unset, standard error.

    Raises:
        LeaseHeldError: another run holds it and is alive (only without `wait`).
        StoreError: the store cannot be reached.
    """
    holder = Holder(holder=uuid4().hex, host=socket.gethostname(), pid=os.getpid(), started=now(), ttl_s=ttl_s)
    tell = tell or _to_standard_error
    patient = PatientStore(store, patience_s, tell)
    generation = _acquire(patient, name, holder, wait, tell)
    heart = _Heart(store, name, generation, renew_every_s or ttl_s / 3)
    heart.start()
    try:
        yield Lease(patient, name, generation, holder, heart)
    finally:
        heart.stop()


def _acquire(store: Store, name: str, holder: Holder, wait: bool, tell: Tell) -> int:
    watch = _Watch(store, name, wait, tell)
    while True:
        generation = _newest(store, name)
        if generation and not watch.is_over(generation):
            time.sleep(min(1.0, watch.ttl_s / 20))
            continue
        if not _create(store, name, generation + 1, holder):
            continue
        # Whoever was slow may have created a generation that came, ended and was cleared away meanwhile.
        if _newest(store, name) == generation + 1:
            _clear(store, name, generation)
            return generation + 1
        store.delete(_key(name, generation + 1, "holder.json"))


def _clear(store: Store, name: str, last: int) -> None:
    # A holder that was slow may have left parts of a generation whose `holder.json` is gone.
    segments = {key.split("/")[2] for key in store.list(f"leases/{name}")}
    for segment in sorted(segments):
        if segment.isdigit() and int(segment) <= last:
            store.delete_prefix(f"leases/{name}/{segment}")


def _create(store: Store, name: str, generation: int, holder: Holder) -> bool:
    key = _key(name, generation, "holder.json")
    try:
        store.create(key, to_text(holder))
    except AlreadyExistsError:
        # After a lost answer the store may hold what was written by the first attempt.
        with suppress(NotFoundError):
            return store.read(key) == to_text(holder)
        return False
    return True


class _Watch:
    """What somebody who wants a lease sees of its holder over time."""

    def __init__(self, store: Store, name: str, wait: bool, tell: Tell) -> None:
        self._store, self._name, self._wait, self._tell = store, name, wait, tell
        self._seen: tuple[int, bytes] | None = None
        self._since = self._looked = self._told = 0.0
        self.ttl_s = 1.0

    def is_over(self, generation: int) -> bool:
        """Whether this generation has ended or its holder is dead. Raises LeaseHeldError."""
        try:
            holder = parse_json(Holder, self._read(generation, "holder.json"), f"the lease on {self._name}")
        except NotFoundError:
            return False  # a newer holder has just cleared it away
        if self._store.exists(_key(self._name, generation, "end.json")):
            return True
        self.ttl_s = holder.ttl_s
        try:
            seen = (generation, self._read(generation, "beat.json"))
        except NotFoundError:
            seen = (generation, b"")
        moment = time.monotonic()
        unanswered = moment - self._looked > max(2.0, holder.ttl_s / 20)
        self._looked = moment
        if unanswered:
            self._since = moment
        if seen != self._seen:
            if self._seen is not None and not self._wait:
                raise LeaseHeldError(
                    f"another run of {self._name} is going ({holder}), so this one leaves; wait until it is done, or "
                    "set on_busy=wait"
                )
            self._seen, self._since = seen, moment
        self._remind(holder, moment)
        return moment - self._since >= holder.ttl_s

    def _remind(self, holder: Holder, moment: float) -> None:
        if self._told and moment - self._told < _REMIND_S:
            return
        self._told = moment
        self._tell(
            f"a run of {self._name} holds the lease ({holder}); watching whether it is alive, for up to "
            f"{holder.ttl_s:g} s" + (", and waiting for it to end" if self._wait else "")
        )

    def _read(self, generation: int, part: str) -> bytes:
        return self._store.read(_key(self._name, generation, part))


class _Heart:
    """Writes the heartbeat of a generation until it is stopped, and then that it has ended."""

    def __init__(self, store: Store, name: str, generation: int, every_s: float) -> None:
        self._store, self._name, self._generation, self._every_s = store, name, generation, every_s
        self.lost = False
        self._interrupts, self._lock = False, threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def interrupts(self, whether: bool) -> None:
        """Whether the main thread is interrupted when the lease is lost; at once where it is lost already."""
        with self._lock:
            self._interrupts = whether
            if whether and self.lost:
                interrupt_main()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        # Where this fails nobody is harmed: others take over when the heartbeat has stayed for long enough.
        with suppress(StoreError):
            if self._is_newest():
                self._store.create(_key(self._name, self._generation, "end.json"), b"{}\n")

    def _beat(self) -> None:
        number, pause = 0, self._every_s
        while not self._stop.wait(pause):
            number += 1
            try:
                if not self._is_newest():
                    self._lose()
                    return
                self._store.write(_key(self._name, self._generation, "beat.json"), b'{"beat": %d}\n' % number)
                pause = self._every_s
            except StoreError:
                # A store that is away for a while is no loss yet, but others see it as silence once it is back.
                pause = min(self._every_s, _AGAIN_S)

    def _lose(self) -> None:
        with self._lock:
            self.lost = True
            if self._interrupts:
                interrupt_main()

    def _is_newest(self) -> bool:
        return _newest(self._store, self._name) == self._generation


def _newest(store: Store, name: str) -> int:
    return max(_generations(store, name), default=0)


def _generations(store: Store, name: str) -> set[int]:
    parts = (key.split("/") for key in store.list(f"leases/{name}"))
    return {int(part[2]) for part in parts if part[3:] == ["holder.json"] and part[2].isdigit()}


def _key(name: str, generation: int, part: str) -> str:
    return f"leases/{name}/{generation:08d}/{part}"


def _to_standard_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
