"""What a failed attempt of a worker group means: the user's error, a machine that is gone, no room, or a
worker that failed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ot_ray.errors import OTRayError

# A machine that vanishes without a word is declared dead after Ray's health checks, half a minute by default.
_VERDICT_S, _DECLARED_S = 30.0, 2.0
# What collectives raise on the workers that are left, sometimes before anybody knows why.
_COLLATERAL = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    own: OTRayError | None
    """The error of our tree that a worker raised, if that is why; trying again would meet it again."""
    lost_machine: bool
    """A machine of the cluster vanished under the group, or was taken back."""
    no_room: bool
    """The group was never placed, because somebody else took the room."""
    final: bool
    """The cluster can never have that much, however long one waits."""
    reason: str
    """One line."""


def machines() -> set[str]:
    """Ids of the cluster's machines that are alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def read_failure(error: BaseException, before: set[str]) -> Failure:
    """Interpret what `trainer.fit()` raised.

    Args:
        before: `machines()` as the attempt began.
    """
    from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError, WorkerGroupStartupTimeoutError

    worker_failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    controller = getattr(error, "controller_failure", None)
    dead = [failure for failure in worker_failures.values() if _is_death(failure)]
    own = next((found for failure in worker_failures.values() if (found := _own(failure))), None)
    no_room = isinstance(controller, WorkerGroupStartupTimeoutError)
    final = isinstance(controller, InsufficientClusterResourcesError)
    lost = _taken_back(error, dead) or _lost_machine(error, dead, own, before, certain=no_room or final)
    return Failure(
        # A worker that died pulls others down with it: what those raised explains nothing.
        own=None if dead or lost else own,
        lost_machine=lost,
        no_room=no_room,
        final=final,
        reason=_reason(error, dead),
    )


def _taken_back(error: BaseException, dead: list[BaseException]) -> bool:
    from ray.train.v2.api.exceptions import PreemptionError

    return isinstance(error, PreemptionError) or any(getattr(_cause(failure), "preempted", False) for failure in dead)


def _lost_machine(
    error: BaseException, dead: list[BaseException], own: OTRayError | None, before: set[str], certain: bool
) -> bool:
    """Whether a machine that vanished since `before` is the reason, waiting for Ray's verdict where that may come."""
    from ray.exceptions import ActorDiedError

    if dead:
        # The report of a dead worker names the machine it ran on. One that does not answer may yet turn out to
        # have gone with its machine.
        said = "\n".join(str(failure) for failure in dead)
        declared = all(isinstance(_cause(failure), ActorDiedError) for failure in dead)
        return _vanishes(before, _DECLARED_S if declared else _VERDICT_S, lambda machine: machine in said)
    # Other errors name no machine, and an idle one may leave the cluster at any time: only what looks like a lost
    # neighbour counts, and workers that never came up, which cannot say where they would have been.
    if own is not None or not (_from_controller(error) or _COLLATERAL.search(str(error))):
        return False
    return _vanishes(before, 0.0 if certain else _VERDICT_S, lambda machine: True)


def _from_controller(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return hasattr(error, "controller_failure") or isinstance(error, RayActorError)


def _vanishes(before: set[str], patience_s: float, counts: Callable[[str], bool]) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        if any(counts(machine) for machine in before - machines()):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)


def _is_death(failure: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(_cause(failure), RayActorError)


def _cause(failure: BaseException) -> BaseException:
    return getattr(failure, "health_check_failure", failure)


def _own(failure: BaseException) -> OTRayError | None:
    return next((item for item in _chain(failure) if isinstance(item, OTRayError)), None)


def _chain(failure: BaseException | None) -> Iterator[BaseException]:
    while failure is not None:
        yield failure
        cause = getattr(failure, "cause", None)
        if isinstance(cause, BaseException):
            yield cause
        failure = failure.__cause__


def _reason(error: BaseException, dead: list[BaseException]) -> str:
    if dead:
        died = "a worker died" if len(dead) == 1 else f"{len(dead)} workers died"
        return f"{died}: {first_line(_cause(dead[0]))}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def first_line(error: BaseException) -> str:
    """What Ray says of the end of an actor, in one line."""
    # Ray's report begins with a table of the actor; what happened to it follows.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__).strip()
