"""A group of training workers under Ray Train: a skin over a function that knows nothing of Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field

from ot_ray.config import Config
from ot_ray.errors import LaunchError, OTRayError

WorkerFunction = Callable[[dict[str, Any]], dict[str, Any]]


class WorkerGroup(Config):
    """How many workers a distributed step has, what each gets, and how often the group is restarted."""

    count: int = Field(default=2, ge=1)
    """Workers; one process each."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs a worker."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs a worker."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts, from the last committed checkpoint, before the run is given up."""
    start_timeout_s: int = Field(default=1800, ge=1)
    """How long an autoscaler may take to bring the machines."""
    ray_storage: str | None = None
    """Folder or address that all nodes reach, for Ray Train's own records; unset, Ray's default."""


def run_workers(function: WorkerFunction, payload: dict[str, Any], group: WorkerGroup, run_name: str) -> dict[str, Any]:
    """Run `function(payload)` on every worker of a new group, with a process group set up.

    Args:
        function: importable on the workers; `payload` holds plain values only.
        run_name: unique among runs in `group.ray_storage`.

    Returns:
        What rank 0 returned.

    Raises:
        LaunchError: the group could not be started, or failed more often than allowed. An error of our own
            tree that a worker raised is raised again as it was.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(group.start_timeout_s))
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = TorchTrainer(
        _worker,
        train_loop_config={"function": function, "payload": payload},
        torch_config=TorchConfig(backend="nccl" if group.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=group.count,
            use_gpu=group.gpus > 0,
            resources_per_worker={"CPU": group.cpus, **({"GPU": group.gpus} if group.gpus else {})},
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=group.ray_storage,
            # Ray Train would turn every print of a library into a log line of its own.
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
            failure_config=FailureConfig(max_failures=group.max_failures),
            # At its usual level Ray Train repeats what our own progress says.
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        with _own_interrupt():
            result = trainer.fit()
    except TrainingFailedError as error:
        raise _own_error(error) or LaunchError(f"run {run_name} failed: {_last_line(error)}") from error
    return result.return_value or {}


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    # Ray Train handles Ctrl-C by aborting the run and leaving with `sys.exit`, and keeps its handler afterwards.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    # Nothing is reported to Ray Train: each report is a barrier, and the figures of every step are in the
    # progress and in the store.
    return config["function"](config["payload"])


def _own_error(error: BaseException) -> OTRayError | None:
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        while failure is not None:
            cause = getattr(failure, "cause", None)
            found = next((item for item in (failure, cause) if isinstance(item, OTRayError)), None)
            if found is not None:
                return found
            failure = failure.__cause__
    return None


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
