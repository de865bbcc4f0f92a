"""The worker: in rounds, it claims what is runnable, and carries it out, many sessions' passes as one.

A plain class; where it runs, and how often a round is taken, is decided by whoever calls `round`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from uuid import uuid4

from ot_ray.errors import LaunchError, StoreUnavailableError
from serve.catalogue.records import GradientOperation
from serve.failures import ApiError, DatabaseUnavailableError
from serve.gradients.collecting import collect
from serve.gradients.desk import ConflictError, Desk
from serve.gradients.leases import HeldOperations
from serve.gradients.moving import load, step
from serve.gradients.sampling import sample
from serve.gradients.saving import save

_log = logging.getLogger(__name__)
Kind = Callable[[Desk, GradientOperation], None]
_BEFORE: dict[str, Kind] = {"load": load, "step": step}
_AFTER: dict[str, Kind] = {"sample": sample, "save": save}
# At a time, so that a worker takes little more than what one pass holds from under the others' hands.
_CLAIMED = 8
_MOST = 64
# What goes by without anybody's doing: the operation is tried again.
_PASSING = (StoreUnavailableError, DatabaseUnavailableError)


class GradientWorker:
    """Carries out operations of gradient learning. Several may run at once, on one machine or many; each operation is
    one's at a time, by a lease, and ends once, by a compare-and-set.

    Args:
        holder: a name that no other worker has; None makes one.
    """

    def __init__(self, desk: Desk, holder: str | None = None) -> None:
        self._desk = desk
        self._held = HeldOperations(desk.catalogue, holder or uuid4().hex, desk.settings.lease_s)
        self._again: list[GradientOperation] = []
        """Claimed, begun, and to be tried again."""

    def start(self) -> None:
        """Hold on to what is claimed for as long as this process lives."""
        self._held.start()

    def close(self) -> None:
        """Give back what is not over."""
        self._held.close()

    @property
    def ended(self) -> tuple[int, int]:
        """Operations that succeeded here, and that failed."""
        succeeded, failed = self._desk.ended
        return succeeded, failed

    def round(self) -> bool:
        """Claim as much as one pass holds, and carry it out.

        Returns:
            Whether something was carried out, so that there may be more.

        Raises:
            DatabaseUnavailableError: the database did not answer; the next round may find it again.
            LaunchError: the model's device does not compute any more; another process has to go on.
        """
        operations = [one for one in self._claim() if one.id in self._held]
        try:
            self._carry_out([one for one in operations if not self._given_up(one)])
        except BaseException as error:
            left = [one for one in operations if one.id in self._held and one not in self._again]
            if isinstance(error, _PASSING):
                self._again += left
            else:
                # Their leases run out, and whoever takes them next counts it against them.
                self._held.drop(*(one.id for one in (*left, *self._again)))
                self._again = []
            raise
        return len(operations) > len(self._again)

    def _carry_out(self, operations: list[GradientOperation]) -> None:
        self._each(operations, _BEFORE)
        collect(self._desk, [one for one in operations if one.kind == "forward_backward"], self._guarded)
        self._each(operations, _AFTER)
        self._desk.residents.trim()

    def _each(self, operations: list[GradientOperation], kinds: dict[str, Kind]) -> None:
        for one in operations:
            if one.kind in kinds:
                self._guarded(one, partial(kinds[one.kind], self._desk, one))

    def _claim(self) -> list[GradientOperation]:
        # In place, so that what was claimed is kept where the database does not answer the next claim.
        taken, settings = self._again, self._desk.settings
        while len(taken) < _MOST and sum(one.rows for one in taken) < settings.max_rows:
            more = self._desk.catalogue.gradient_operations.claim(self._held.holder, settings.lease_s, _CLAIMED)
            self._held.add(*(one.id for one in more))
            taken += more
            if len(more) < _CLAIMED:
                break
        self._again = []
        # One that this worker itself was late with came again, as another attempt.
        return list({one.id: one for one in taken}.values())

    def _given_up(self, operation: GradientOperation) -> bool:
        most = self._desk.settings.attempts
        if operation.attempt <= most:
            return False
        self._guarded(operation, partial(_lost, most))
        return True

    def _guarded(self, operation: GradientOperation, work: Callable[[], None], *, last: bool = True) -> None:
        """Do something of an operation. What goes wrong is told to its client, unless it is nobody's doing.

        Args:
            last: the operation is over then.
        """
        try:
            try:
                work()
            except (LaunchError, ConflictError, *_PASSING):
                raise
            except Exception as error:
                self._desk.fail(operation, error)
                last = True
        except ConflictError:
            # Another one has it, or it has to be done again.
            self._again.append(operation)
            self._held.renew()
        except _PASSING as error:
            _log.warning("operation %s has to wait: %s", operation.id, error)
            self._again.append(operation)
        else:
            if last:
                self._held.drop(operation.id)


def _lost(times: int) -> None:
    raise ApiError(f"The server was lost {times} times over this operation; send fewer rows at a time.", 500)
