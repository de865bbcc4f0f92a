"""The controller's skin over Ray: whose fault an error is, and how a replica goes."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from ot_ray.errors import AdapterRejectedError, StoreUnavailableError
from serve import remote_controller
from serve.failures import BusyError
from serve.remote_controller import JobController, run_canary


def engine(error: Exception) -> Any:
    """A handle whose canary runs end so."""

    def result(timeout_s: float) -> None:
        raise error

    return SimpleNamespace(canary=SimpleNamespace(remote=lambda model_id: SimpleNamespace(result=result)))


def told(cause: Exception) -> RayTaskError:
    return RayTaskError("canary", "trace", cause)


@pytest.mark.parametrize(
    "error",
    [
        DeploymentUnavailableError(SimpleNamespace(name="Engine")),  # type: ignore[arg-type]
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
        RayServeException("gone"),
        ActorUnavailableError("gone", None),
        TimeoutError(),
        told(RuntimeError("CUDA out of memory")),
        told(OSError("disk")),
    ],
)
def test_trouble_of_the_engine_is_no_verdict(error: Exception) -> None:
    with pytest.raises(BusyError):
        run_canary(engine(error), "ft:x")


@pytest.mark.parametrize("cause", [AdapterRejectedError("bad"), StoreUnavailableError("away")])
def test_what_the_engine_says_itself_stays(cause: Exception) -> None:
    with pytest.raises(type(cause)):
        run_canary(engine(told(cause)), "ft:x")


class Rounds:
    """Rounds that take no time."""

    def tick(self) -> bool:
        return True


def config() -> Any:
    return SimpleNamespace(jobs=SimpleNamespace(tick_s=0.01))


def test_a_replica_goes_within_seconds_whatever_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    stays, closed = threading.Event(), threading.Event()

    def build(config: Any, engine: Any, opened: ExitStack) -> Any:
        opened.callback(stays.wait, 90)
        opened.callback(closed.set)
        return Rounds()

    monkeypatch.setattr(remote_controller, "build_controller", build)
    monkeypatch.setattr(remote_controller, "_CLOSE_S", 0.05)
    controller = JobController(config(), engine(TimeoutError()))
    controller.check_health()
    before = time.monotonic()
    controller.close()
    assert time.monotonic() - before < 60
    assert closed.is_set() and not controller._thread.is_alive()
    stays.set()


def test_one_that_cannot_be_built_closes_what_it_opened_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    def build(config: Any, engine: Any, opened: ExitStack) -> Any:
        opened.callback(closed.set)
        raise ValueError("the cause")

    monkeypatch.setattr(remote_controller, "build_controller", build)
    with pytest.raises(ValueError, match="the cause"):
        JobController(config(), engine(TimeoutError()))
    assert closed.is_set()
    JobController.__new__(JobController).__del__()
