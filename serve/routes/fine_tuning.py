"""`/v1/fine_tuning/jobs`: taking jobs on, telling how they stand, and noting what their owners want of them.

Running them is the controller's; this module changes a status only where no run of the job can be under way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from ot_ray.errors import NotFoundError
from serve.catalogue import Catalogue
from serve.catalogue.records import ENDED, Job
from serve.failures import ApiError
from serve.routes import service_of
from serve.routes.identity import Identity, needs, noted
from serve.routes.job_checks import job_fields, queue_full
from serve.routes.job_objects import checkpoint_object, event_object, job_object
from serve.routes.once import OnceRoute, once_of
from serve.service import Service
from serve.wire import fine_tuning as wire
from serve.wire.paging import After, Limit, Listing, shown, unknown_cursor

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"], route_class=OnceRoute)

Asker = Annotated[Identity, Depends(needs("jobs"))]
_CANCELLED = "fine_tuning.job.cancelled"
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_MOST_PAIRS = 16
_TURNS = 10


@router.post("", summary="Create a fine-tuning job")
def create_job(request: Request, body: wire.JobRequest, identity: Asker) -> wire.FineTuningJob:
    """Have a model tuned on a file of examples; the job's data are validated before it is queued."""
    service = service_of(request)
    catalogue = _catalogue(service)
    once, most = once_of(request), identity.limits.queued_jobs
    job_id = once.new_id("ftjob-")
    job = _made_before(catalogue, identity, job_id) if once.taken_over else None
    if job is None:
        fields = job_fields(service, catalogue, identity, body)
        line = noted(request, identity, "job.create", training_file=body.training_file)
        job = catalogue.jobs.create(identity.tenant_id, job_id=job_id, most_waiting=most, audit=line, **fields)
    if job is None:
        raise queue_full(most)
    return job_object(job)


@router.get("", summary="List fine-tuning jobs")
def list_jobs(request: Request, identity: Asker, after: After = None, limit: Limit = 20) -> Listing[wire.FineTuningJob]:
    """The asker's jobs, the newest first; `metadata[key]=value` keeps those that have it, `metadata=null` those that
    have none."""
    catalogue = _catalogue(service_of(request))
    pairs, without = _metadata_filter(request.query_params.multi_items())
    try:
        page = catalogue.jobs.list(
            identity.tenant_id, after=after, limit=limit, metadata=pairs, without_metadata=without
        )
    except NotFoundError:
        raise unknown_cursor("fine-tuning job", after) from None
    return Listing.of([job_object(job) for job in page.items], page.has_more)


@router.get("/{job_id}", summary="Retrieve a fine-tuning job")
def get_job(request: Request, job_id: str, identity: Asker) -> wire.FineTuningJob:
    """One job."""
    return job_object(_job(_catalogue(service_of(request)), identity, job_id))


@router.get("/{job_id}/events", summary="List the events of a fine-tuning job")
def list_events(
    request: Request, job_id: str, identity: Asker, after: After = None, limit: Limit = 20
) -> Listing[wire.JobEvent]:
    """What happened to a job, the newest first: messages, and metrics with step, losses, token accuracy and rate."""
    catalogue = _catalogue(service_of(request))
    _job(catalogue, identity, job_id)
    try:
        page = catalogue.events.list(identity.tenant_id, job_id, after=after, limit=limit)
    except NotFoundError:
        raise unknown_cursor("event", after) from None
    return Listing.of([event_object(event) for event in page.items], page.has_more)


@router.get("/{job_id}/checkpoints", summary="List the checkpoints of a fine-tuning job")
def list_checkpoints(
    request: Request, job_id: str, identity: Asker, after: After = None, limit: Limit = 10
) -> Listing[wire.JobCheckpoint]:
    """The models from the ends of a job's epochs, the latest first."""
    catalogue = _catalogue(service_of(request))
    _job(catalogue, identity, job_id)
    try:
        page = catalogue.checkpoints.list(identity.tenant_id, job_id, after=after, limit=limit)
    except NotFoundError:
        raise unknown_cursor("checkpoint", after) from None
    return Listing.of([checkpoint_object(item) for item in page.items], page.has_more)


@router.post("/{job_id}/cancel", summary="Cancel a fine-tuning job")
def cancel_job(request: Request, job_id: str, identity: Asker) -> wire.FineTuningJob:
    """End a job. One that waits is cancelled at once, one that runs as soon as it has been stopped; cancelling a
    cancelled job changes nothing."""
    catalogue = _catalogue(service_of(request))
    line = noted(request, identity, "job.cancel")

    def attempt(job: Job) -> Job | None:
        if job.status == "cancelled":
            return job
        _refuse_ended(job, "cancelled")
        if job.status == "running":
            return catalogue.jobs.want(identity.tenant_id, job_id, "cancel", expected=("running",), audit=line)
        moved = catalogue.jobs.move(
            job_id,
            (job.status,),
            "cancelled",
            event="The fine-tuning job was cancelled",
            deliver=_CANCELLED,
            wanted="cancel",
            audit=line,
        )
        return catalogue.jobs.get(identity.tenant_id, job_id) if moved else None

    return _changed(catalogue, identity, job_id, attempt)


@router.post("/{job_id}/pause", summary="Pause a fine-tuning job")
def pause_job(request: Request, job_id: str, identity: Asker) -> wire.FineTuningJob:
    """Hold a job. One that runs stops after its last checkpoint was kept; pausing a paused job changes nothing."""
    catalogue = _catalogue(service_of(request))
    line = noted(request, identity, "job.pause")

    def attempt(job: Job) -> Job | None:
        if job.status == "paused":
            return job
        _refuse_ended(job, "paused")
        _refuse_cancelling(job, "paused")
        if job.status != "queued":
            # The controller acts on it: when the files are validated, or when the run has stopped.
            return catalogue.jobs.want(identity.tenant_id, job_id, "pause", expected=(job.status,), audit=line)
        event = "The fine-tuning job was paused"
        moved = catalogue.jobs.move(job_id, ("queued",), "paused", event=event, wanted="run", audit=line)
        return catalogue.jobs.get(identity.tenant_id, job_id) if moved else None

    return _changed(catalogue, identity, job_id, attempt)


@router.post("/{job_id}/resume", summary="Resume a fine-tuning job")
def resume_job(request: Request, job_id: str, identity: Asker) -> wire.FineTuningJob:
    """Have a paused job go on from its last checkpoint, when its turn comes again; one that is not paused goes on
    anyway."""
    catalogue = _catalogue(service_of(request))
    most, line = identity.limits.queued_jobs, noted(request, identity, "job.resume")

    def attempt(job: Job) -> Job | None:
        _refuse_ended(job, "resumed")
        _refuse_cancelling(job, "resumed")
        if job.status != "paused":
            return catalogue.jobs.want(identity.tenant_id, job_id, "run", expected=(job.status,), audit=line)
        event = "The fine-tuning job was resumed and waits in the queue"
        found = catalogue.jobs.resume(identity.tenant_id, job_id, event=event, most_waiting=most, audit=line)
        if found == "full":
            raise queue_full(most)
        return catalogue.jobs.get(identity.tenant_id, job_id) if found == "resumed" else None

    return _changed(catalogue, identity, job_id, attempt)


def _catalogue(service: Service) -> Catalogue:
    assert service.catalogue is not None, "these routes are mounted over a database only"
    return service.catalogue


def _made_before(catalogue: Catalogue, identity: Identity, job_id: str) -> Job | None:
    """The job of an earlier try, whatever has become since of what it was made from."""
    try:
        return catalogue.jobs.get(identity.tenant_id, job_id)
    except NotFoundError:
        return None


def _job(catalogue: Catalogue, identity: Identity, job_id: str) -> Job:
    try:
        return catalogue.jobs.get(identity.tenant_id, job_id)
    except NotFoundError:
        raise ApiError(
            f"Could not find fine tune: {shown(job_id)}", 404, "fine_tune_not_found", "fine_tuning_job_id"
        ) from None


def _changed(
    catalogue: Catalogue, identity: Identity, job_id: str, attempt: Callable[[Job], Job | None]
) -> wire.FineTuningJob:
    """Try a change until nobody else's comes in between.

    Args:
        attempt: changes a job as it was just read; None if its status had changed meanwhile.
    """
    for _ in range(_TURNS):
        changed = attempt(_job(catalogue, identity, job_id))
        if changed is not None:
            return job_object(changed)
    raise ApiError("The job changes faster than it can be told; try again.", 503, "unavailable", retry_after_s=1)


def _refuse_ended(job: Job, done: str) -> None:
    if job.status in ENDED:
        raise _refused(f"Fine-tuning job {job.id} has ended with status '{job.status}' and cannot be {done}.")


def _refuse_cancelling(job: Job, done: str) -> None:
    if job.wanted == "cancel":
        raise _refused(f"Fine-tuning job {job.id} is being cancelled and cannot be {done}.")


def _refused(message: str) -> ApiError:
    return ApiError(message, code="invalid_job_status", param="fine_tuning_job_id")


def _metadata_filter(query: list[tuple[str, str]]) -> tuple[dict[str, str], bool]:
    """The pairs of `metadata[key]=value`, and whether `metadata=null` was sent."""
    pairs: dict[str, str] = {}
    without = False
    for name, value in query:
        match = _METADATA.fullmatch(name)
        if match is not None:
            pairs[match[1]] = value
        elif name == "metadata" and value == "null":
            without = True
        elif name == "metadata":
            raise ApiError("metadata is a filter; write metadata[key]=value, or metadata=null.", param="metadata")
    if len(pairs) > _MOST_PAIRS or (pairs and without):
        raise ApiError(
            f"metadata filters by at most {_MOST_PAIRS} pairs, or by null, but not by both.", param="metadata"
        )
    return pairs, without
