"""The only room of the library that imports Ray: clusters, worker groups, job launchers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ot_ray.launch.auxiliary_workers import AuxiliaryWorkers
from ot_ray.launch.cluster import own_cluster, ray_cluster
from ot_ray.launch.jobs import JobLauncher, JobSpec, RayJobLauncher, wait_for_job
from ot_ray.launch.metrics import RunMetrics
from ot_ray.launch.ports import require_free_port
from ot_ray.launch.processes import ProcessLauncher
from ot_ray.launch.search import Found, SearchConfig, Trial, search_rates
from ot_ray.launch.workers import WorkerGroup, run_workers

if TYPE_CHECKING:
    from ot_ray.launch.auxiliary_pool import AuxiliaryPool

__all__ = [
    "AuxiliaryPool",
    "AuxiliaryWorkers",
    "Found",
    "JobLauncher",
    "JobSpec",
    "ProcessLauncher",
    "RayJobLauncher",
    "RunMetrics",
    "SearchConfig",
    "Trial",
    "WorkerGroup",
    "own_cluster",
    "ray_cluster",
    "require_free_port",
    "run_workers",
    "search_rates",
    "wait_for_job",
]


def __getattr__(name: str) -> Any:
    # It alone needs torch, without which commands and workers start sooner.
    if name == "AuxiliaryPool":
        from ot_ray.launch.auxiliary_pool import AuxiliaryPool

        return AuxiliaryPool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
