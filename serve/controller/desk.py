"""What every step of the controller works with, and the ways in which a job ends without a model.

The steps themselves are in checking, starting, watching and finishing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ot_ray.artifacts import InspectionLimits
from ot_ray.launch import JobLauncher, JobSpec
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.catalogue.records import Job
from serve.controller.acceptance import AcceptanceWork, Outcome
from serve.controller.reports import for_customers
from serve.settings.jobs import JobsConfig


@dataclass(frozen=True)
class Desk:
    """What the steps share. Every change they make is a compare-and-set in the catalogue, so that two controllers
    that work on one job do no harm."""

    catalogue: Catalogue
    store: Store
    launcher: JobLauncher
    settings: JobsConfig
    accept: Callable[[AcceptanceWork], Outcome]
    """Inspects an adapter and enters it into the registry, wherever that is run."""
    canary: Callable[[str], object]
    """Runs a plug-in against the base model on an engine; raises AdapterRejectedError."""
    prepare: Callable[[Job, Path], JobSpec]
    """Fills a job's part of the store and the folder that it is shipped with, and says how it is run."""
    limits: InspectionLimits
    """What an adapter may be like."""
    clock: Callable[[], float]
    """Seconds since 1970."""
    paces: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)
    """Step and time of the first figures that this process saw of an attempt of a job."""
    entered: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Models that this process entered into the registry for a job, by its id; what is not promoted is removed."""

    def fail(
        self, job: Job, code: str, message: str, param: str | None = None, data: dict[str, Any] | None = None
    ) -> None:
        """End a job as failed, for a reason that its owner reads.

        Args:
            data: figures for the event that tells it.
        """
        told = for_customers(message)
        self.catalogue.runs.end(
            job,
            "failed",
            f"The job failed: {told}",
            level="error",
            data=data,
            deliver="fine_tuning.job.failed",
            error={"code": code, "message": told, "param": param},
            estimated_finish=None,
        )

    def cancel(self, job: Job) -> None:
        """End a job that its owner gave up; none of its processes runs any more."""
        self.catalogue.runs.end(
            job,
            "cancelled",
            "The fine-tuning job was cancelled",
            deliver="fine_tuning.job.cancelled",
            estimated_finish=None,
        )

    def pause(self, job: Job) -> None:
        """Put a job aside, unless its owner wants it to run again; none of its processes runs any more, and its
        checkpoints stay."""
        self.catalogue.runs.pause(job, "The fine-tuning job was paused")


def job_prefix(job: Job) -> str:
    """Where everything of a job lies in the store."""
    return f"jobs/{job.id}"
