"""A store that waits for another store which is away, instead of failing at once.

What counts as away, and how one request is tried again, is left to the stores themselves."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ot_ray.errors import AlreadyExistsError, StoreUnavailableError
from ot_ray.store.base import Advance, ObjectInfo, Store

T = TypeVar("T")

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 10.0  # seconds between attempts
_TELL_EVERY = 60.0  # seconds


def _tell_person(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class PatientStore:
    """A store whose every call is repeated while the store behind it does not answer. See `Store` for the methods.

    Args:
        store: where the bytes are.
        patience_s: seconds that one call waits for the store to come back, counted from its first failure.
        tell: is given a line for a person when the store goes away, once a minute, and when it is back;
            standard error unless told otherwise.

    Every method raises StoreUnavailableError, with the time waited, when patience runs out.
    """

    url: str

    def __init__(self, store: Store, patience_s: float, tell: Callable[[str], None] = _tell_person) -> None:
        self._store, self._patience_s, self._tell = store, patience_s, tell
        self._abandoned = threading.Event()
        self.url = store.url

    def __reduce__(self) -> tuple[type[PatientStore], tuple[Store, float]]:
        return PatientStore, (self._store, self._patience_s)

    def __repr__(self) -> str:
        return f"PatientStore({self._store!r}, {self._patience_s})"

    @property
    def inner(self) -> Store:
        """The store behind."""
        return self._store

    def around(self, store: Store) -> PatientStore:
        """Another store, waited for as this one is."""
        return PatientStore(store, self._patience_s, self._tell)

    def abandon(self) -> None:
        """Wait no longer: calls that wait now, and all later ones, fail as the store behind fails."""
        self._abandoned.set()

    def read(self, key: str) -> bytes:
        return self._patiently(lambda: self._store.read(key))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        return self._patiently(lambda: self._store.read_range(key, start, end))

    def info(self, key: str) -> ObjectInfo:
        return self._patiently(lambda: self._store.info(key))

    def exists(self, key: str) -> bool:
        return self._patiently(lambda: self._store.exists(key))

    def write(self, key: str, data: bytes) -> None:
        self._patiently(lambda: self._store.write(key, data))

    def create(self, key: str, data: bytes) -> None:
        """As `Store.create`. Where an answer was lost, an object of just these bytes counts as this call's own; so
        creators who race must write different bytes, such as their names."""
        failed: list[StoreUnavailableError] = []

        def create() -> None:
            try:
                self._store.create(key, data)
            except StoreUnavailableError as error:
                failed.append(error)
                raise
            except AlreadyExistsError:
                if not failed or self._store.read(key) != data:
                    raise

        self._patiently(create)

    def upload(self, path: str | Path, key: str, progress: Advance | None = None) -> ObjectInfo:
        counted = _once(progress)
        return self._patiently(lambda: self._store.upload(path, key, counted()))

    def download(self, key: str, path: str | Path, sha256: str | None = None, progress: Advance | None = None) -> None:
        counted = _once(progress)
        self._patiently(lambda: self._store.download(key, path, sha256, counted()))

    def list(self, prefix: str = "") -> Iterator[str]:
        # Whole pages first: a listing that broke in the middle starts again.
        yield from self._patiently(lambda: [*self._store.list(prefix)])

    def delete(self, key: str) -> None:
        self._patiently(lambda: self._store.delete(key))

    def delete_prefix(self, prefix: str) -> None:
        self._patiently(lambda: self._store.delete_prefix(prefix))

    def _patiently(self, call: Callable[[], T]) -> T:
        left_at: float | None = None
        told_at, delay = 0.0, _FIRST_DELAY
        while True:
            try:
                answer = call()
            except StoreUnavailableError as error:
                now = time.monotonic()
                if left_at is None:
                    left_at, told_at = now, now - _TELL_EVERY
                waited = now - left_at
                if waited >= self._patience_s or self._abandoned.is_set():
                    raise StoreUnavailableError(f"{error}; gave up after {waited:.0f} s of waiting") from error
                if now - told_at >= _TELL_EVERY:
                    told_at = now
                    self._tell(f"{error}; waiting for it, {waited:.0f} of {self._patience_s:.0f} s so far")
                self._abandoned.wait(min(delay, self._patience_s - waited))
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                if left_at is not None:
                    self._tell(f"the store answers again after {time.monotonic() - left_at:.0f} s")
                return answer


def _once(progress: Advance | None) -> Callable[[], Advance | None]:
    """Makes a counter for each attempt; together they count every byte once."""
    if progress is None:
        return lambda: None
    report, most = progress, 0

    def counter() -> Advance:
        moved = 0

        def advance(count: int) -> None:
            nonlocal moved, most
            moved += count
            if moved > most:
                report(moved - most)
                most = moved

        return advance

    return counter
