"""Isolated jobs behind one interface. `RayJobLauncher` runs them on a shared Ray cluster, where jobs of
several owners are not walled off from each other; see docs/architecture.md for what that promises."""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ot_ray.errors import LaunchError

DONE = {"succeeded", "failed", "stopped"}


@dataclass(frozen=True)
class JobSpec:
    """One job: a command with its resources. Environment variables appear in job records: no secrets."""

    job_id: str
    """Also the idempotency key: a second submission of it is refused."""
    command: list[str]
    working_dir: str | None = None
    """Folder that is shipped to the cluster and becomes the job's current one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int | None = None


class JobLauncher(Protocol):
    """Starts, watches and stops jobs."""

    def submit(self, spec: JobSpec) -> str:
        """Start a job, return its id. Raises LaunchError if it is refused or the id was used before."""
        ...

    def status(self, job_id: str) -> str:
        """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
        ...

    def message(self, job_id: str) -> str:
        """Why the job is in its state, in words."""
        ...

    def logs(self, job_id: str) -> AsyncIterator[str]:
        """Pieces of the job's output as they come, until it is done."""
        ...

    def stop(self, job_id: str) -> None:
        """Stop a job and wait until its process is gone; a job that is done is no error."""
        ...


class RayJobLauncher:
    """The Ray Jobs API at a dashboard's address."""

    def __init__(self, address: str) -> None:
        # Ray chooses its authentication when imported: after `ray_cluster` has said which.
        from ray.job_submission import JobSubmissionClient

        # It tells of every package it uploads and every connection it closes.
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise LaunchError(f"the Ray Jobs API at {address} does not answer: {error}; check the address") from None

    def submit(self, spec: JobSpec) -> str:
        environment = {"env_vars": dict(spec.environment)}
        if spec.working_dir:
            environment["working_dir"] = spec.working_dir  # type: ignore[assignment]
        try:
            return self._client.submit_job(
                entrypoint=shlex.join(spec.command),
                submission_id=spec.job_id,
                runtime_env=environment,
                entrypoint_num_cpus=spec.cpus,
                entrypoint_num_gpus=spec.gpus,
                entrypoint_memory=spec.memory_bytes,
            )
        except (RuntimeError, ValueError) as error:
            last = str(error).strip().splitlines()[-1]
            raise LaunchError(f"job {spec.job_id} was not accepted: {last}") from None

    def status(self, job_id: str) -> str:
        return self._client.get_job_status(job_id).value.lower()

    def message(self, job_id: str) -> str:
        return self._client.get_job_info(job_id).message or ""

    def logs(self, job_id: str) -> AsyncIterator[str]:
        return self._client.tail_job_logs(job_id)

    def stop(self, job_id: str, timeout_s: float = 30.0) -> None:
        self._client.stop_job(job_id)
        asyncio.run(self._until_done(job_id, timeout_s))

    async def _until_done(self, job_id: str, timeout_s: float) -> None:
        for _ in range(int(timeout_s / 0.2)):
            if self.status(job_id) in DONE:
                return
            await asyncio.sleep(0.2)
        raise LaunchError(
            f"job {job_id} did not stop within {timeout_s:.0f} s; look at it with `ray job logs {job_id}`"
        )


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
    except BaseException:
        launcher.stop(job_id)
        raise
    status = launcher.status(job_id)
    if status != "succeeded":
        detail = last or launcher.message(job_id)
        raise LaunchError(f"job {job_id} ended as {status}: {detail}")
