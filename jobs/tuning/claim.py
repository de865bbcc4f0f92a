"""The right to write to a job's part of the store: the run that started last has it, and an earlier one that was
thought dead ends as soon as it looks. What is written there is hosted.py's."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from ot_ray.errors import LeaseLostError, NotFoundError, OTRayError
from ot_ray.store import ObjectInfo, PatientStore, Store
from ot_ray.store.base import Advance

KEY = "claim"
_LOOK_S = 3.0


def _end_process(reason: str) -> None:
    sys.stderr.write(f"error: {reason}\n")
    sys.stderr.flush()
    # Nothing that runs in other threads may write any more, at the end of a `with` neither.
    os._exit(1)


class Claim:
    """Taken when it is made, from whoever had it.

    Args:
        store: where the object `claim` tells whose turn it is; it goes with the job's others.
        patience_s: seconds to wait for a store that is away.

    Raises:
        StoreError, StoreUnavailableError: the store does not take it.
    """

    def __init__(self, store: Store, patience_s: float) -> None:
        self._store, self._mark = store, uuid4().hex.encode()
        PatientStore(store, patience_s).write(KEY, self._mark)

    def require(self) -> None:
        """Raises LeaseLostError if another run has the claim, or the job is over and its part of the store removed."""
        try:
            mark = self._store.read(KEY)
        except NotFoundError:
            mark = None
        if mark != self._mark:
            raise LeaseLostError("another run of this job has started, or the job is over; this one writes no more")

    @contextmanager
    def held(self, look_s: float = _LOOK_S, end: Callable[[str], object] = _end_process) -> Iterator[None]:
        """Look at the claim every `look_s` seconds while the block runs, and end the process once it is lost. At the
        block's end it is given back.

        Args:
            end: is given the reason, in a thread of its own.
        """
        over = threading.Event()

        def look() -> None:
            while not over.wait(look_s):
                try:
                    self.require()
                except LeaseLostError as error:
                    end(str(error))
                    return
                except OTRayError:
                    # A store that is away says nothing of who writes to it.
                    continue

        thread = threading.Thread(target=look, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(look_s)
            # A claim that cannot be given back goes with the job.
            with suppress(OTRayError):
                self.require()
                self._store.delete(KEY)

    def guard(self, store: Store) -> Store:
        """The same store for the holder of the claim alone: each change asks for it first. Raises LeaseLostError."""
        return _GuardedStore(store, self)


class _GuardedStore:
    """See `Store` for the methods."""

    def __init__(self, store: Store, claim: Claim) -> None:
        self._store, self._claim = store, claim
        self.url = store.url
        self.read, self.read_range, self.info = store.read, store.read_range, store.info
        self.exists, self.download, self.list = store.exists, store.download, store.list

    def write(self, key: str, data: bytes) -> None:
        self._claim.require()
        self._store.write(key, data)

    def create(self, key: str, data: bytes) -> None:
        self._claim.require()
        self._store.create(key, data)

    def upload(self, path: str | Path, key: str, progress: Advance | None = None) -> ObjectInfo:
        self._claim.require()
        return self._store.upload(path, key, progress)

    def delete(self, key: str) -> None:
        self._claim.require()
        self._store.delete(key)

    def delete_prefix(self, prefix: str) -> None:
        self._claim.require()
        self._store.delete_prefix(prefix)
