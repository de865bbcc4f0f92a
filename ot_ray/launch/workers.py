"""A group of training workers under Ray Train: a skin over a function that knows nothing of Ray.

Every attempt is one Ray Train run of its own; where a function resumes from is the function's affair."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field, field_validator

from ot_ray.config import Config
from ot_ray.errors import LaunchError
from ot_ray.launch.attendance import Attendance, asked, each, tell_on_stderr
from ot_ray.launch.devices import gpu_visibility
from ot_ray.launch.failures import Failure, machines, read_failure

WorkerFunction = Callable[[dict[str, Any]], dict[str, Any]]
_PLACING_S = 60
# An attempt whose workers never came up ends after the placing time and what Ray itself needs to begin.
_CAME_UP_S = 2 * _PLACING_S
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class WorkerGroup(Config):
    """How many workers a distributed step has, what each gets, and how often the group is restarted."""

    count: int | tuple[int, int] = 2
    """Workers, one process each; or `[fewest, most]`: the group shrinks when machines vanish and grows when
    they come back, each time from the last committed checkpoint."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs a worker."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs a worker."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts, from the last committed checkpoint, after a worker failed, before the run is given up. A machine
    that was lost does not count; an error that is the user's to mend is never tried again."""
    start_timeout_s: int = Field(default=1800, ge=1)
    """Seconds that the run waits for room for its fewest workers, at its start and after a loss: how long an
    autoscaler may take to bring the machines."""
    resize_interval_s: float = Field(default=600.0, gt=0)
    """Seconds between two looks for room for more workers, where `count` is a range; twice as long after each
    growth of a group. Growing starts the group anew and costs the steps since the last checkpoint."""
    ray_storage: str | None = None
    """Folder or address that all nodes reach, for Ray Train's own records; unset, Ray's default."""

    @field_validator("count", mode="before")
    @classmethod
    def _check_count(cls, value: Any) -> Any:
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if not whole or len(numbers) not in (1, 2) or (len(numbers) == 1 and numbers != [value]):
            raise ValueError("write a whole number, or [fewest, most]")
        if min(numbers) < 1 or numbers != sorted(numbers):
            raise ValueError("workers start at 1, and the fewest are no more than the most")
        return tuple(numbers) if len(numbers) == 2 else value

    @property
    def fewest(self) -> int:
        """Workers without which the run waits."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """Workers that the run uses where there is room."""
        return self.count if isinstance(self.count, int) else self.count[1]

    @property
    def resources(self) -> dict[str, float]:
        """What one worker needs, as Ray counts it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def run_workers(
    function: WorkerFunction,
    payload: dict[str, Any],
    group: WorkerGroup,
    run_name: str,
    tell: Callable[[str], None] = tell_on_stderr,
) -> dict[str, Any]:
    """Run `function(payload)` on every worker of a new group, with a process group set up.

    A group that fails is started anew; `function` sees by its own records how far it had come.

    Args:
        function: importable on the workers; `payload` holds plain values only.
        run_name: for messages and Ray Train's records; may have been used before.
        tell: shows one line: that the run waits, or starts again, and why.

    Returns:
        What rank 0 returned.

    Raises:
        LaunchError: there was no room for the group for too long, or it failed more often than allowed. An error
            of our own tree that a worker raised ends the run at once and is raised again as it was.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import TrainingFailedError

    attendance = Attendance(group.fewest, group.most, group.resources, group.start_timeout_s, tell)
    failures = 0
    while True:
        start = attendance.gather()
        present, began = machines(), time.monotonic()
        try:
            return _attempt(function, payload, group, run_name, start)
        except (TrainingFailedError, RayActorError) as error:
            failure = read_failure(error, present)
            if failure.own is not None:
                raise failure.own from error
            failures += _counts(failure)
            if failure.final or failures > group.max_failures:
                raise LaunchError(_given_up(run_name, failure, failures, group)) from error
        # A group that ran for long may find no room where it grows; it had come up all the same.
        if not failure.no_room or time.monotonic() - began > _CAME_UP_S:
            attendance.started()
        tell(_again(failure, failures, group))


def _attempt(
    function: WorkerFunction, payload: dict[str, Any], group: WorkerGroup, run_name: str, start: int
) -> dict[str, Any]:
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from ot_ray.launch.elastic import ElasticTrainer

    run_config = RunConfig(
        # What Ray Train remembers of an earlier attempt by the same name must not speak into this one.
        name=f"{run_name}-{secrets.token_hex(4)}",
        storage_path=group.ray_storage,
        # Ray Train would turn every print of a library into a log line of its own.
        worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", **gpu_visibility(group.resources)}},
        failure_config=_no_retries(),
        # At its usual level Ray Train repeats what our own progress says.
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    _check_storage(run_config, group)
    trainer = ElasticTrainer(
        _worker,
        start=start,
        resources=group.resources,
        train_loop_config={"function": function, "payload": payload},
        torch_config=TorchConfig(backend="nccl" if group.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=group.count,
            use_gpu=group.gpus > 0,
            resources_per_worker=group.resources,
            elastic_resize_monitor_interval_s=group.resize_interval_s,
        ),
        run_config=run_config,
    )
    with _own_interrupt(), _placing_time(min(_PLACING_S, group.start_timeout_s)):
        return trainer.fit().return_value or {}


def _no_retries() -> Any:
    """Whether to try again is decided by `run_workers`, where a user's error is told from a machine's.

    Ray Train itself would also try for ever, at the size from before, after a machine that was taken back.
    """
    from ray.train import FailureConfig

    return FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)


def _check_storage(run_config: Any, group: WorkerGroup) -> None:
    try:
        # Opens the place, and makes its folder.
        _ = run_config.storage_context
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"workers.ray_storage is {group.ray_storage!r}, which Ray Train cannot write to: {error}; name a folder "
            "or an address that all machines reach"
        ) from None


def _counts(failure: Failure) -> bool:
    return not (failure.lost_machine or failure.no_room)


def _given_up(run_name: str, failure: Failure, failures: int, group: WorkerGroup) -> str:
    if failure.final:
        count = asked(group.fewest, group.most)
        return (
            f"run {run_name} failed: workers.count is {count}, but the cluster can never have room for {group.fewest} "
            f"({each(group.resources)} each): {failure.reason}; add machines, or lower workers.count, workers.cpus or "
            "workers.gpus"
        )
    message = f"run {run_name} failed: {failure.reason}"
    if failures <= 1:
        return message
    return f"{message} (failure {failures}; workers.max_failures is {group.max_failures})"


def _again(failure: Failure, failures: int, group: WorkerGroup) -> str:
    if failure.lost_machine:
        return "a machine was lost; starting again from the last checkpoint"
    if failure.no_room:
        return "the room for the workers was taken; trying again"
    return f"{failure.reason}; starting again from the last checkpoint (failure {failures} of {group.max_failures})"


@contextlib.contextmanager
def _placing_time(seconds: float) -> Iterator[None]:
    # Ray Train has no other place for it. The room was there a moment ago, so that this is short.
    before = os.environ.get(_START_TIMEOUT)
    os.environ[_START_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_START_TIMEOUT]
        else:
            os.environ[_START_TIMEOUT] = before


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
