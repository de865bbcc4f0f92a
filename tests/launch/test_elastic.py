"""When a group grows: into room that a real Ray of four CPUs has, and ever less often."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from ot_ray.launch import elastic
from ot_ray.launch.cluster import ClusterAddress

pytestmark = pytest.mark.slow


@dataclass
class Group:
    """What the policy reads of a running group."""

    num_workers: int
    start_time: float


class Requests:
    """Takes what the policy asks of an autoscaler, which no single machine has."""

    def maybe_send_resource_request(self, config: ScalingConfig, workers: int) -> None:
        assert workers == config.max_workers


def test_each_growth_doubles_the_time_until_the_next(
    local_ray: ClusterAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Quarters of a CPU, so that there is room whatever earlier tests still hold a moment longer.
    resources = {"CPU": 0.25}
    config = ScalingConfig(num_workers=(1, 99), resources_per_worker=resources, elastic_resize_monitor_interval_s=10.0)
    policy = elastic.FreeRoomPolicy(config, 1, resources)
    policy._coordinator_client = Requests()  # type: ignore[assignment]
    now = 0.0
    monkeypatch.setattr(elastic, "time_monotonic", lambda: now)

    def grows(after: float, group: Group) -> bool:
        nonlocal now
        now = after
        decision = policy.make_decision_for_running_worker_group(group, None)  # type: ignore[arg-type]
        assert isinstance(decision, NoopDecision | ResizeDecision)
        return isinstance(decision, ResizeDecision) and decision.num_workers > group.num_workers

    first, second, third = Group(1, 0.0), Group(2, 12.0), Group(3, 35.0)
    assert [grows(at, first) for at in (9.0, 11.0)] == [False, True]
    assert [grows(at, second) for at in (23.0, 31.0, 33.0)] == [False, False, True]
    assert [grows(at, third) for at in (74.0, 76.0)] == [False, True]
