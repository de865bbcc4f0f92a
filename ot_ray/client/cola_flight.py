"""A batch between being asked for and being fitted: its gradients come down in a thread of its own.

Which batches are under way at a time is cola_trainer.py's to say."""

from __future__ import annotations

import threading

from ot_ray.client.cola_session import ColaFuture
from ot_ray.client.cola_wire import Passed, Rows
from ot_ray.cola import GradientFile
from ot_ray.errors import NotFiniteError, ServiceError


class Flight:
    """A batch that the service has, and whose gradients come down in a thread."""

    def __init__(self, rows: Rows, future: ColaFuture[Passed], again: bool) -> None:
        self.rows, self.future, self.again = rows, future, again
        self._found: GradientFile | BaseException | None = None
        # Whoever gives up does not wait for a service that does not answer.
        self._thread = threading.Thread(target=self._run, name="cola-gradients", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self.future.gradients()
        except BaseException as error:
            self._found = error

    def wait(self) -> None:
        """Until the gradients are here, or will not come."""
        self._thread.join()

    def gradients(self) -> GradientFile:
        """The gradients; errors are those of `ColaFuture.gradients`."""
        self.wait()
        if isinstance(self._found, GradientFile):
            return self._found
        assert self._found is not None
        raise self._found

    def passed(self) -> Passed | None:
        """What the pass said, even where its gradients were refused; None where it was itself."""
        try:
            return self.future.result()
        except (NotFiniteError, ServiceError):
            return None
