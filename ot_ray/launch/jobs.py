"""Isolated jobs behind one interface. `RayJobLauncher` runs them on a shared Ray cluster, where jobs of
several owners are not walled off from each other; see docs/architecture.md for what that promises."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import shlex
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ot_ray.errors import AlreadyExistsError, LaunchError, NotFoundError, OTRayError
from ot_ray.launch.devices import gpu_visibility
from ot_ray.launch.job_start import start_command

DONE = {"succeeded", "failed", "stopped"}
_STOP_SECONDS = 10.0
_AGENT_SECONDS = 60.0
_ANSWER_SECONDS = 120.0
# Ray gives a job up that was not placed for some minutes (RAY_JOB_START_TIMEOUT_SECONDS of its head).
_NO_ROOM = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
_COMMAND_FAILED = "JOB_ENTRYPOINT_COMMAND_ERROR"
_UNKNOWN, _KNOWN = re.compile(r"Job \S+ does not exist"), re.compile(r"submission_id \S+ already exists")


@dataclass(frozen=True)
class JobSpec:
    """One job: a command with its resources.

    It sees nothing of the surroundings' secrets. Environment variables appear in job records, so none belong there
    either; what a job needs of them stands in a file of its working folder.
    """

    job_id: str
    """Also the idempotency key: a second submission of it is refused."""
    command: list[str]
    working_dir: str | None = None
    """Folder that is shipped to the cluster and becomes the job's current one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 1.0
    gpus: float = 0.0
    """A job that asks for none sees none."""
    memory_bytes: int | None = None
    time_limit_s: float | None = None
    """Wall-clock seconds after which the command is ended; the job has then failed."""
    joins_ray: bool = True
    """Whether the command may join the cluster that it runs on; one that may not is not told where it is."""


class JobLauncher(Protocol):
    """Starts, watches and stops jobs."""

    def submit(self, spec: JobSpec) -> str:
        """Start a job, return its id. What the working folder holds is taken before this returns.

        Raises:
            AlreadyExistsError: the id was used before; that job is there, whatever became of it.
            LaunchError: the job was refused, or the launcher does not answer.
        """
        ...

    def status(self, job_id: str) -> str:
        """`pending`, `running`, `succeeded`, `failed` or `stopped`.

        Raises:
            NotFoundError: no such job is known, as after a cluster's head was lost; so do the methods below.
            LaunchError: the launcher does not answer.
        """
        ...

    def message(self, job_id: str) -> str:
        """Why the job is in its state, in words."""
        ...

    def found_no_room(self, job_id: str) -> bool:
        """Whether a job failed before its command began, because the cluster had no room for it in time.

        The same work may be submitted again, under another id.
        """
        ...

    def exit_status(self, job_id: str) -> int | None:
        """How a job's command ended by itself: 0 if it succeeded, -n if signal n killed it. None where it did not: it
        runs, was stopped, could not begin, or was lost with what it ran on."""
        ...

    def logs(self, job_id: str) -> AsyncIterator[str]:
        """Pieces of the job's output as they come, until it is done."""
        ...

    def stop(self, job_id: str) -> None:
        """Stop a job and wait until its process is gone; a job that is done is no error."""
        ...

    def forget(self, job_id: str) -> None:
        """Drop what is kept of a job that is done, beside how it ended; its id stays used."""
        ...


class RayJobLauncher:
    """The Ray Jobs API at a dashboard's address.

    A command is started by job_start.py, with the Python of its own first word where that is one.

    Args:
        address: of the dashboard, `http://host:port`.
        ray_address: of the same cluster, `host:port`, for jobs that join it. On a machine with several clusters Ray
            itself may tell them another.

    Raises:
        LaunchError: nothing answers there.
    """

    def __init__(self, address: str, ray_address: str | None = None) -> None:
        # Ray chooses its authentication when imported: after `ray_cluster` has said which.
        from ray.job_submission import JobSubmissionClient

        # They tell of every package they upload and every connection they close.
        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        self._ray_address = ray_address
        try:
            self._client = JobSubmissionClient(address)
        except (OSError, RuntimeError, ValueError) as error:
            raise LaunchError(
                f"the Ray Jobs API at {address} does not answer: {_last_line(error)}; check the address"
            ) from None
        # Its own requests wait for ever.
        self._client._do_request = functools.partial(self._client._do_request, timeout=_ANSWER_SECONDS)

    def submit(self, spec: JobSpec) -> str:
        environment: dict[str, Any] = {"env_vars": dict(spec.environment)}
        if spec.working_dir:
            environment["working_dir"] = spec.working_dir
        command = start_command(
            spec.command,
            given=spec.environment,
            # Not by `env_vars`, which the job's own Ray tasks would inherit.
            fixed=gpu_visibility({"GPU": spec.gpus}) | self._address_for(spec),
            joins_ray=spec.joins_ray,
            time_limit_s=spec.time_limit_s,
        )
        deadline = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                with self._refusals(f"job {spec.job_id} was not accepted"):
                    return self._client.submit_job(
                        # Without `exec`, some shells stay between the command and what ends it with Ray.
                        entrypoint=f"exec {shlex.join(command)}",
                        submission_id=spec.job_id,
                        runtime_env=environment,
                        entrypoint_num_cpus=spec.cpus,
                        entrypoint_num_gpus=spec.gpus,
                        entrypoint_memory=spec.memory_bytes,
                    )
            except LaunchError as error:
                # A cluster that has just started answers so for a while.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def status(self, job_id: str) -> str:
        with self._refusals(f"job {job_id} cannot be looked at"):
            return self._client.get_job_status(job_id).value.lower()

    def message(self, job_id: str) -> str:
        with self._refusals(f"job {job_id} cannot be looked at"):
            return self._client.get_job_info(job_id).message or ""

    def found_no_room(self, job_id: str) -> bool:
        with self._refusals(f"job {job_id} cannot be looked at"):
            return self._client.get_job_info(job_id).error_type == _NO_ROOM

    def exit_status(self, job_id: str) -> int | None:
        with self._refusals(f"job {job_id} cannot be looked at"):
            known = self._client.get_job_info(job_id)
        ended = known.status.value == "SUCCEEDED" or known.error_type == _COMMAND_FAILED
        return known.driver_exit_code if ended else None

    def logs(self, job_id: str) -> AsyncIterator[str]:
        return self._client.tail_job_logs(job_id)

    def stop(self, job_id: str, timeout_s: float = 30.0) -> None:
        with self._refusals(f"job {job_id} cannot be stopped"):
            self._client.stop_job(job_id)
        deadline = time.monotonic() + timeout_s
        while self.status(job_id) not in DONE:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"job {job_id} did not stop within {timeout_s:.0f} s; look at it with `ray job logs {job_id}`"
                )
            time.sleep(0.2)

    def forget(self, job_id: str) -> None:
        """See `JobLauncher`. Ray keeps a small record of each job, without which an id could be used again."""
        self.status(job_id)

    def _address_for(self, spec: JobSpec) -> dict[str, str]:
        return {"RAY_ADDRESS": self._ray_address} if spec.joins_ray and self._ray_address is not None else {}

    @staticmethod
    @contextmanager
    def _refusals(task: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OTRayError):
                raise
            reason = _last_line(error)
            raise _kind(reason)(f"{task}: {reason}") from None


def wait_for_job(launcher: JobLauncher, job_id: str, show: Callable[[str], None]) -> None:
    """Show a job's output until it is done; stop it if the wait is interrupted.

    Raises:
        LaunchError: the job did not succeed; the last line of its output is in the message.
    """
    last = ""

    async def follow() -> None:
        nonlocal last
        async for piece in launcher.logs(job_id):
            show(piece)
            lines = [line for line in piece.splitlines() if line.strip()]
            last = lines[-1] if lines else last

    try:
        asyncio.run(follow())
        # The output can end a moment before the job does.
        while (status := launcher.status(job_id)) not in DONE:
            time.sleep(0.2)
    except BaseException:
        _stop_if_it_can(launcher, job_id, show)
        raise
    if status != "succeeded":
        detail = last or launcher.message(job_id)
        raise LaunchError(f"job {job_id} ended as {status}: {detail}")


def _stop_if_it_can(launcher: JobLauncher, job_id: str, show: Callable[[str], None]) -> None:
    # After Ctrl-C on a terminal, which reaches every process of its group, Ray's Jobs API was seen never to answer.
    stopped: list[str] = []

    def stop() -> None:
        with contextlib.suppress(Exception):
            launcher.stop(job_id)
            stopped.append(job_id)

    thread = threading.Thread(target=stop, name=f"stop {job_id}", daemon=True)
    thread.start()
    thread.join(_STOP_SECONDS)
    if not stopped:
        show(f"job {job_id} could not be stopped and ends with its cluster; if that goes on: ray job stop {job_id}")


def _kind(reason: str) -> type[OTRayError]:
    # Ray tells these apart in words only.
    if _KNOWN.search(reason):
        return AlreadyExistsError
    return NotFoundError if _UNKNOWN.search(reason) else LaunchError


def _last_line(error: Exception) -> str:
    # The server answers with its own stack trace; the reason stands at its end, before a full stop of its own.
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__
