"""The only room of the library that imports Ray: clusters, worker groups, job launchers."""

from ot_ray.launch.cluster import own_cluster, ray_cluster
from ot_ray.launch.jobs import JobLauncher, JobSpec, RayJobLauncher, wait_for_job
from ot_ray.launch.metrics import RunMetrics
from ot_ray.launch.ports import require_free_port
from ot_ray.launch.processes import ProcessLauncher
from ot_ray.launch.search import Found, SearchConfig, Trial, search_rates
from ot_ray.launch.workers import WorkerGroup, run_workers

__all__ = [
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
