"""Waiting for room on a real Ray of four CPUs: the message, the end of the patience, and room that comes late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from ot_ray.errors import LaunchError
from ot_ray.launch import WorkerGroup, attendance, run_workers, workers
from ot_ray.launch.attendance import Attendance, room_for
from ot_ray.launch.cluster import ClusterAddress
from tests.launch.worker_functions import sum_of_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _free(local_ray: ClusterAddress) -> None:
    """What earlier tests held has come back before one counts."""
    _wait_for_room(4)


def _wait_for_room(cpus: int) -> None:
    # Ray gives back what was released a moment later.
    deadline = time.monotonic() + 120
    while (room := room_for({"CPU": 1.0})) != cpus:
        assert time.monotonic() < deadline, f"room for {room}, not for {cpus}"
        time.sleep(0.1)


@contextmanager
def _occupied(cpus: int) -> Iterator[None]:
    from ray.util import placement_group, remove_placement_group

    group = placement_group([{"CPU": 1.0}] * cpus)
    try:
        assert group.wait(120)
        _wait_for_room(4 - cpus)
        yield
    finally:
        remove_placement_group(group)


def test_a_group_that_never_fits_ends_with_what_was_asked_and_what_there_was(local_ray: ClusterAddress) -> None:
    told: list[str] = []
    group = WorkerGroup(count=6, start_timeout_s=5)
    with pytest.raises(LaunchError) as caught:
        run_workers(sum_of_ranks, {"offset": 0}, group, "never", told.append)
    assert str(caught.value).startswith(
        "workers.count is 6, but the cluster had room for 4 (1 CPU each) for 5 s; add machines, "
    )
    assert str(caught.value).endswith("wait longer with workers.start_timeout_s")
    assert len(told) == 1
    assert told[0].startswith("waiting for 6 workers with 1 CPU each; the cluster has room for 4 (")
    assert told[0].endswith(" s left, workers.start_timeout_s)")


def test_a_worker_that_no_machine_can_hold_is_waited_for_too(local_ray: ClusterAddress) -> None:
    told: list[str] = []
    waiting = Attendance(1, 3, {"CPU": 1.0, "GPU": 1.0}, 5, told.append)
    with pytest.raises(LaunchError, match=r"workers.count is \[1, 3\], but .* room for 0 \(1 CPU and 1 GPU each\)"):
        waiting.gather()
    assert told[0].startswith("waiting for 1 worker with 1 CPU and 1 GPU each; the cluster has room for 0 (")


def test_room_that_comes_while_one_waits_is_taken(local_ray: ClusterAddress) -> None:
    told: list[str] = []
    waiting, done = threading.Event(), threading.Event()

    def hold() -> None:
        with _occupied(3):
            waiting.set()
            done.wait(120)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert waiting.wait(150)

        def tell(text: str) -> None:
            told.append(text)
            done.set()

        assert Attendance(2, 2, {"CPU": 1.0}, 200, tell).gather() == 2
    finally:
        done.set()
        thread.join()
    assert len(told) == 1
    assert "waiting for 2 workers" in told[0]


def test_as_many_as_fit_come_up_to_the_most(local_ray: ClusterAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(attendance, "_EXTRA_S", 60.0)
    assert Attendance(1, 3, {"CPU": 1.0}, 120, told.append).gather() == 3
    _wait_for_room(4)
    assert Attendance(2, 2, {"CPU": 1.5}, 120, told.append).gather() == 2
    _wait_for_room(4)
    # The third has no room, and is waited for as long as this says.
    monkeypatch.setattr(attendance, "_EXTRA_S", 10.0)
    with _occupied(2):
        assert Attendance(1, 3, {"CPU": 1.0}, 120, told.append).gather() == 2


def test_a_poll_that_stalls_beyond_the_end_does_not_end_in_silence(
    local_ray: ClusterAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    clock = Clock()
    monkeypatch.setattr(attendance, "time", clock)

    @contextmanager
    def stalling(bundles: list[dict[str, float]]) -> Iterator[Callable[[float], bool]]:
        yield lambda seconds: clock.passes(7200)

    monkeypatch.setattr(attendance, "_placement", stalling)
    with pytest.raises(LaunchError, match="for 600 s"):
        Attendance(6, 6, {"CPU": 1.0}, 600, told.append).gather()
    (only,) = told
    assert only.endswith("has room for 4 (0 s left, workers.start_timeout_s)")


def test_the_patience_spans_attempts_until_one_has_started(local_ray: ClusterAddress) -> None:
    waiting = Attendance(9, 9, {"CPU": 1.0}, 1, lambda text: None)
    with pytest.raises(LaunchError):
        waiting.gather()
    with pytest.raises(LaunchError, match="for 1 s"):
        waiting.gather()
    waiting.started()
    assert waiting._since is None


@pytest.mark.parametrize(("ran_s", "attempts"), [(7200, 2), (110, 1)])
def test_a_group_that_ran_for_long_gets_all_the_patience_when_it_finds_no_room_to_grow(
    local_ray: ClusterAddress, monkeypatch: pytest.MonkeyPatch, ran_s: float, attempts: int
) -> None:
    clock, group = Clock(), WorkerGroup(count=(1, 2), start_timeout_s=100)
    monkeypatch.setattr(attendance, "time", clock)
    monkeypatch.setattr(workers, "time", clock)
    seen: list[int] = []

    def attempt(*arguments: object) -> dict[str, object]:
        seen.append(1)
        if len(seen) == 1:
            clock.passes(ran_s)
            raise ControllerError(WorkerGroupStartupTimeoutError(2))
        return {"attempts": len(seen)}

    # An attempt that runs for hours.
    monkeypatch.setattr(workers, "_attempt", attempt)
    outcome = nullcontext() if attempts == 2 else pytest.raises(LaunchError, match=r"workers\.start_timeout_s")
    with outcome:
        assert run_workers(sum_of_ranks, {}, group, "growing", lambda text: None) == {"attempts": 2}
    assert len(seen) == attempts


def test_room_that_can_never_be_is_said_with_the_settings_that_ask_for_it(
    local_ray: ClusterAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(*arguments: object) -> dict[str, object]:
        raise ControllerError(InsufficientClusterResourcesError("no machine type has a GPU"))

    # Only a cluster whose autoscaler knows its machines says so.
    monkeypatch.setattr(workers, "_attempt", attempt)
    with pytest.raises(LaunchError) as caught:
        run_workers(sum_of_ranks, {}, WorkerGroup(count=(1, 2)), "never", lambda text: None)
    assert str(caught.value) == (
        "run never failed: workers.count is [1, 2], but the cluster can never have room for 1 (1 CPU each): "
        "no machine type has a GPU; add machines, or lower workers.count, workers.cpus or workers.gpus"
    )


class Clock:
    """Real time, and hours that pass at once."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def passes(self, seconds: float) -> bool:
        self._ahead += seconds
        return False
