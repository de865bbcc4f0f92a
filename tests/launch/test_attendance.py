"""Waiting for room on a real Ray of four CPUs: the message, the end of the patience, and room that comes late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ot_ray.errors import LaunchError
from ot_ray.launch import WorkerGroup, run_workers
from ot_ray.launch.attendance import Attendance
from ot_ray.launch.cluster import ClusterAddress
from tests.launch.worker_functions import sum_of_ranks

pytestmark = pytest.mark.slow


@contextmanager
def _occupied(cpus: int) -> Iterator[None]:
    from ray.util import placement_group, remove_placement_group

    group = placement_group([{"CPU": 1.0}] * cpus)
    try:
        assert group.wait(120)
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
    attendance = Attendance(1, 3, {"CPU": 1.0, "GPU": 1.0}, 5, told.append)
    with pytest.raises(LaunchError, match=r"workers.count is \[1, 3\], but .* room for 0 \(1 CPU and 1 GPU each\)"):
        attendance.gather()
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


def test_as_many_as_fit_come_up_to_the_most(local_ray: ClusterAddress) -> None:
    told: list[str] = []
    assert Attendance(1, 3, {"CPU": 1.0}, 120, told.append).gather() == 3
    with _occupied(2):
        assert Attendance(1, 3, {"CPU": 1.0}, 120, told.append).gather() == 2
    assert Attendance(2, 2, {"CPU": 1.5}, 120, told.append).gather() == 2


def test_the_patience_spans_attempts_until_one_has_started(local_ray: ClusterAddress) -> None:
    attendance = Attendance(9, 9, {"CPU": 1.0}, 1, lambda text: None)
    with pytest.raises(LaunchError):
        attendance.gather()
    with pytest.raises(LaunchError, match="for 1 s"):
        attendance.gather()
    attendance.started()
    assert attendance._since is None
