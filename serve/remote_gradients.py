"""The gradient worker behind Ray Serve: rounds in a thread of each replica.

What a round does is gradients/worker.py's; deploying the replicas is app.py's."""

from __future__ import annotations

import logging
import threading
import time

from ot_ray.errors import LaunchError
from ot_ray.store import open_store
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.failures import DatabaseUnavailableError
from serve.gradients.loading import load_desk
from serve.gradients.worker import GradientWorker

_log = logging.getLogger(__name__)
_JOIN_S = 5.0
# Of one round, which may hold several passes and samples.
_SILENT_S = 900.0


class Gradients:
    """One replica; the sessions are in the database and the store, so that another one goes on where this one ends."""

    def __init__(self, config: ServeConfig) -> None:
        assert config.gradients is not None
        assert config.database is not None
        assert config.store is not None
        self._catalogue = Catalogue.open(config.database)
        self._catalogue.migrate(config.database.start_wait_s)
        desk = load_desk(config, config.gradients, self._catalogue, open_store(config.store))
        self._worker = GradientWorker(desk)
        self._worker.start()
        self._poll_s, self._stop, self._last = config.gradients.poll_s, threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises here again and again."""
        if not self._thread.is_alive() or time.monotonic() > self._last + _SILENT_S:
            raise LaunchError("the gradient worker takes no rounds any more")

    def stats(self) -> dict[str, int]:
        """Operations that succeeded in this replica, and that failed."""
        succeeded, failed = self._worker.ended
        return {"succeeded": succeeded, "failed": failed}

    def _run(self) -> None:
        while not self._stop.is_set():
            pause_s = 0.0
            try:
                pause_s = 0.0 if self._worker.round() else self._poll_s
            except LaunchError:
                _log.exception("this replica cannot go on")
                self._give_back()
                return
            except DatabaseUnavailableError as error:
                _log.warning("the database does not answer: %s", error)
                pause_s = 1.0
            except Exception:
                _log.exception("a round of the gradient worker failed")
                pause_s = 1.0
            self._last = time.monotonic()
            self._stop.wait(pause_s)

    def close(self) -> None:
        """Take no more rounds; another replica begins anew what is not over."""
        self._stop.set()
        self._thread.join(_JOIN_S)
        self._give_back()
        if not self._thread.is_alive():
            self._catalogue.close()

    def _give_back(self) -> None:
        try:
            self._worker.close()
        except DatabaseUnavailableError as error:
            _log.warning("operations are given back when their leases end: %s", error)

    def __del__(self) -> None:
        # One that could not be built has nothing to close, and its error is the one to be seen.
        if hasattr(self, "_thread") and not self._stop.is_set():
            self.close()
