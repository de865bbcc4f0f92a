"""What Ray Train's errors mean, on errors as Ray itself makes them and a real Ray that says which machines live."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from ot_ray.errors import DataError
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.launch.failures import machines, read_failure
from ot_ray.launch.workers import _no_retries

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


def test_a_machine_that_left_does_not_explain_an_error_that_names_itself(local_ray: ClusterAddress) -> None:
    before = machines() | {GONE}
    mistake = DataError("the source dried up")
    of_ours = read_failure(_group_error({0: mistake, 1: RuntimeError("Connection closed by peer")}), before)
    assert of_ours.own is mistake
    assert not of_ours.lost_machine
    foreign = read_failure(_group_error({0: ValueError("odd")}), before)
    assert foreign.reason.endswith("odd")
    assert not foreign.lost_machine


def test_the_end_of_the_run_s_own_controller_is_put_down_to_the_lost_machine(local_ray: ClusterAddress) -> None:
    assert read_failure(ActorDiedError(), machines() | {GONE}).lost_machine


def test_a_machine_that_was_taken_back_is_lost_while_it_is_still_there(local_ray: ClusterAddress) -> None:
    here = machines()
    taken = RayActorError(preempted=True)
    dead = WorkerHealthCheckFailedError("A worker health check failed.", taken)
    assert read_failure(_group_error({0: dead, 1: DataError("silent")}), here).lost_machine
    assert read_failure(_preemption(), here).lost_machine


def test_ray_train_hands_every_failure_over_at_once() -> None:
    decide = DefaultFailurePolicy(_no_retries()).make_decision
    group, placing = _group_error({0: ValueError("odd")}), ControllerError(WorkerGroupStartupTimeoutError(2))
    assert {decide(error) for error in (_preemption(), group, placing)} == {FailureDecision.RAISE}


def test_room_that_was_taken_and_room_that_can_never_be(local_ray: ClusterAddress) -> None:
    taken = read_failure(ControllerError(WorkerGroupStartupTimeoutError(2)), machines())
    assert (taken.no_room, taken.final, taken.lost_machine) == (True, False, False)
    never = read_failure(ControllerError(InsufficientClusterResourcesError("too much")), machines() | {GONE})
    assert never.final
    assert never.reason == "too much"


def _group_error(failures: dict[int, Exception]) -> WorkerGroupError:
    return WorkerGroupError("\n".join(str(failure) for failure in failures.values()), failures)


def _death(machine: str) -> Exception:
    return WorkerHealthCheckFailedError(f"A worker health check failed.\nnode_id='{machine}'", ActorDiedError())


def _preemption() -> PreemptionError:
    return PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={GONE: [1]}))
