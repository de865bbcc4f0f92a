"""Jobs, their events and their checkpoints as OpenAI's objects, made of the database's records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.catalogue.records import Checkpoint, Job, JobEvent
from serve.wire import fine_tuning as wire


def job_object(job: Job) -> wire.FineTuningJob:
    """A job as clients see it: "auto" until numbers are there."""
    numbers: Mapping[str, Any] = {**job.hyperparameters, **(job.resolved or {})}
    names = wire.JobHyperparameters.model_fields
    hyperparameters = wire.JobHyperparameters(**{name: numbers.get(name, "auto") for name in names})
    ended = job.finished_at is not None
    return wire.FineTuningJob(
        id=job.id,
        created_at=job.created_at,
        error=wire.JobError(**job.error) if job.error else None,
        fine_tuned_model=job.fine_tuned_model,
        finished_at=job.finished_at,
        hyperparameters=hyperparameters,
        model=job.model,
        organization_id=job.tenant_id,
        result_files=job.result_files,
        seed=job.seed,
        status=job.status,
        trained_tokens=job.trained_tokens if ended else None,
        training_file=job.training_file,
        validation_file=job.validation_file,
        estimated_finish=job.estimated_finish if job.status == "running" else None,
        integrations=[],
        metadata=job.metadata,
        method=wire.JobMethod(supervised=wire.JobSupervised(hyperparameters=hyperparameters)),
        user_provided_suffix=job.suffix,
        offsite=wire.JobOffsite(tuning_method=job.method["tuning_method"], bundle_id=job.bundle.get("bundle_id")),
    )


def event_object(event: JobEvent) -> wire.JobEvent:
    """An event as clients see it."""
    return wire.JobEvent(
        id=event.id,
        created_at=event.created_at,
        level=event.level,  # type: ignore[arg-type]
        message=event.message,
        type=event.type,  # type: ignore[arg-type]
        data=event.data or {},
    )


def checkpoint_object(item: Checkpoint) -> wire.JobCheckpoint:
    """A checkpoint as clients see it."""
    return wire.JobCheckpoint(
        id=item.id,
        created_at=item.created_at,
        fine_tuned_model_checkpoint=item.fine_tuned_model_checkpoint,
        fine_tuning_job_id=item.job_id,
        metrics=wire.CheckpointMetrics(**{"step": item.step_number, **item.metrics}),
        step_number=item.step_number,
    )
