"""Ray Train's trainer for groups that grow and shrink: sizes come from room that is really free.

Imported only where Ray is; `workers` decides what happens when a group fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.util import time_monotonic

from ot_ray.launch.attendance import room_for


class FreeRoomPolicy(ElasticScalingPolicy):
    """Starts with as many workers as were found to fit, and grows into free room.

    Ray's own policy reads the machines' whole capacity. Where a driver or another run holds part of it, that
    policy would stop a healthy group again and again for a larger one that cannot be placed; and without room
    it spins, so that the run can no longer be aborted.

    Growing costs the steps since the last checkpoint, so each growth doubles the time until the next look:
    machines that trickle in do not keep the group from its next checkpoint.
    """

    def __init__(self, scaling_config: ScalingConfig, start: int, resources: Mapping[str, float]) -> None:
        super().__init__(scaling_config)
        self._start_with, self._resources = start, dict(resources)
        self._interval_s = scaling_config.elastic_resize_monitor_interval_s

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        return self._get_resize_decision(self._start_with)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        now = time_monotonic()
        since = max(worker_group_state.start_time, self._latest_monitor_time)
        if now - since < self._interval_s:
            return NoopDecision()
        self._latest_monitor_time = now
        present = worker_group_state.num_workers
        if present >= self.scaling_config.max_workers:
            return NoopDecision()
        found = present + room_for(self._resources)
        if found == present:
            return NoopDecision()
        self._interval_s *= 2
        return self._get_resize_decision(min(found, self.scaling_config.max_workers))


class ElasticTrainer(TorchTrainer):
    """A `TorchTrainer` whose elastic group follows `FreeRoomPolicy`; one of fixed size is Ray's own.

    Args:
        start: workers to start with.
        resources: what each needs; the rest of the arguments are `TorchTrainer`'s.
    """

    def __init__(self, *args: Any, start: int, resources: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start_with, self._resources = start, dict(resources)

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            kwargs["scaling_policy"] = FreeRoomPolicy(self.scaling_config, self._start_with, self._resources)
        return super()._initialize_and_run_controller(**kwargs)
