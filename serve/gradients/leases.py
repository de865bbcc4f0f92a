"""The operations that this process carries out, held on to while it lives."""

from __future__ import annotations

import logging
import threading

from serve.catalogue import Catalogue
from serve.failures import DatabaseUnavailableError

_log = logging.getLogger(__name__)
# A lease outlives two renewals that the database does not answer.
_SHARE = 1 / 3


class HeldOperations:
    """Leases on operations, which a thread of its own renews; those that others took over are let go.

    Args:
        holder: the name that they are claimed under.
        lease_s: seconds that each renewal gives.
        every_s: seconds between two; None for a third of that.
    """

    def __init__(self, catalogue: Catalogue, holder: str, lease_s: float, every_s: float | None = None) -> None:
        self.holder = holder
        self._catalogue, self._lease_s = catalogue, lease_s
        self._every_s = lease_s * _SHARE if every_s is None else every_s
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._ids: set[str] = set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Renew from now on."""
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def add(self, *ids: str) -> None:
        """Hold on to operations that were just claimed."""
        with self._lock:
            self._ids.update(ids)

    def drop(self, *ids: str) -> None:
        """Hold on no more: they are over, or somebody else's to do."""
        with self._lock:
            self._ids.difference_update(ids)

    def __contains__(self, operation_id: object) -> bool:
        """Whether nobody else is known to have taken it over."""
        with self._lock:
            return operation_id in self._ids

    def renew(self) -> None:
        """Renew all leases, and let go of those that are lost.

        Raises:
            DatabaseUnavailableError: nothing is known of them.
        """
        with self._lock:
            ids = set(self._ids)
        if not ids:
            return
        lost = ids - self._catalogue.gradient_operations.renew(self.holder, ids, self._lease_s)
        with self._lock:
            # Those that ended meanwhile are dropped already.
            lost &= self._ids
            self._ids -= lost
        for operation_id in lost:
            _log.warning("operation %s was taken over, or its session closed; its results are dropped", operation_id)

    def close(self) -> None:
        """Renew no more, and give back what is not over.

        Raises:
            DatabaseUnavailableError: they are given back by their leases' end.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._catalogue.gradient_operations.release(self.holder)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.renew()
            except DatabaseUnavailableError as error:
                _log.warning("leases are not renewed: %s", error)
            except Exception:
                _log.exception("leases could not be renewed")
