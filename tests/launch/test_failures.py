"""What Ray Train's errors mean, on errors as Ray itself makes them and a real Ray that says which machines live."""

from __future__ import annotations

import pytest

from ot_ray.errors import DataError
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.launch.failures import machines, read_failure

pytestmark = pytest.mark.slow

GONE = "f" * 56


def test_a_dead_worker_on_a_lost_machine_is_the_machine_s(local_ray: ClusterAddress) -> None:
    failure = read_failure(_group_error({0: _death(GONE)}), machines() | {GONE})
    assert failure.lost_machine
    assert failure.own is None


def test_a_dead_worker_elsewhere_than_on_the_lost_machine_is_its_own(local_ray: ClusterAddress) -> None:
    (here,) = machines()
    failure = read_failure(_group_error({0: _death(here)}), {here, GONE})
    assert not failure.lost_machine
    assert failure.reason.startswith("a worker died: ")


def test_a_user_s_error_stands_unless_a_worker_died_with_it(local_ray: ClusterAddress) -> None:
    here = machines()
    mistake = DataError("the source dried up")
    assert read_failure(_group_error({1: mistake}), here).own is mistake
    assert read_failure(_group_error({0: _death(*here), 1: mistake}), here).own is None
    assert read_failure(_group_error({0: RuntimeError("odd"), 1: mistake}), here).own is mistake


def test_what_collectives_raise_on_a_lost_machine_is_the_machine_s(local_ray: ClusterAddress) -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert read_failure(_group_error({0: error}), machines() | {GONE}).lost_machine


def test_room_that_was_taken_and_room_that_can_never_be(local_ray: ClusterAddress) -> None:
    from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError, WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    taken = read_failure(ControllerError(WorkerGroupStartupTimeoutError(2)), machines())
    assert (taken.no_room, taken.final, taken.lost_machine) == (True, False, False)
    never = read_failure(ControllerError(InsufficientClusterResourcesError("too much")), machines() | {GONE})
    assert never.final
    assert never.reason == "too much"


def _group_error(failures: dict[int, Exception]) -> Exception:
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("\n".join(str(failure) for failure in failures.values()), failures)


def _death(machine: str) -> Exception:
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError(f"A worker health check failed.\nnode_id='{machine}'", ActorDiedError())
