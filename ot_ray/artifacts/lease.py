"""One run at a time: a lease in a store, kept by a heartbeat and taken over when the heartbeat stops.

Which work a lease guards is left to the caller."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
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

    def __init__(self, store: Store, name: str, generation: int, holder: Holder) -> None:
        self._store, self._name, self._generation = store, name, generation
        self.holder = holder

    def require(self) -> None:
        """Make sure, by looking into the store, that the lease is still held.

        Raises:
            LeaseLostError: another run has taken over.
        """
        if _newest(self._store, self._name) != self._generation:
            raise LeaseLostError(
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
    is alive, and one whose heartbeat stays for the holder's own `ttl_s` is dead and is replaced.

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
        yield Lease(patient, name, generation, holder)
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
    for generation in _generations(store, name):
        if generation <= last:
            store.delete_prefix(f"leases/{name}/{generation:08d}")


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
        self._since = self._told = 0.0
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
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        # Where this fails nobody is harmed: others take over when the heartbeat has stayed for long enough.
        with suppress(StoreError):
            if self._is_newest():
                self._store.create(_key(self._name, self._generation, "end.json"), b"{}\n")

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(self._every_s):
            number += 1
            # A store that is away for a while is no loss yet; whether it was one, `Lease.require` finds out.
            with suppress(StoreError):
                if not self._is_newest():
                    return
                self._store.write(_key(self._name, self._generation, "beat.json"), b'{"beat": %d}\n' % number)

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
