"""From a finished training to served models: acceptance, canary, promotion, results file, and what is removed after.

Every step may be repeated: ids follow from bytes and from the job's own id, and the job ends by one compare-and-set."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

from ot_ray.artifacts import Registry
from ot_ray.errors import AdapterRejectedError, NotFoundError
from serve.catalogue.records import Job
from serve.catalogue.runs import Line
from serve.controller.acceptance import AcceptanceWork
from serve.controller.desk import Desk, job_prefix
from serve.controller.reports import for_customers
from serve.controller.starting import submission_id
from serve.stored_files import keep_file

_LONGEST_SUFFIX = 64
_MOST_RESULT_BYTES = 64 * 2**20
_ACCEPTED = "accepted"
_STEP_FOLDER = re.compile(r"step-([0-9]{1,9})")


def finish(desk: Desk, job: Job) -> None:
    """Take a job whose training is done to its end; whoever cancels it until its model is promoted is heard."""
    if job.wanted == "cancel" and job.stage == "accepting":
        desk.cancel(job)
        return
    if job.stage == "promoting":
        # Whatever a second judgement said, the first may be in service.
        assert job.resolved is not None, "a job is judged after its validation"
        _promote(desk, job, job.resolved[_ACCEPTED])
        return
    accepted = _judge(desk, job)
    if accepted is not None and desk.catalogue.runs.to_stage(
        job,
        "promoting",
        expected={"accepting"},
        unless_cancelled=True,
        resolved={**(job.resolved or {}), _ACCEPTED: accepted},
    ):
        _promote(desk, job, accepted)


def _judge(desk: Desk, job: Job) -> dict[str, Any] | None:
    """The accepted models of a job, and of its checkpoints with their figures; None where the job has failed."""
    output = f"{job_prefix(job)}/output"
    try:
        model = _model(desk, job, f"{output}/adapter", suffix_of(job))
    except AdapterRejectedError as error:
        desk.fail(job, "adapter_rejected", f"The tuned adapter cannot be served: {'; '.join(error.reasons)}")
        return None
    checkpoints = _checkpoint_models(desk, job, output) if desk.settings.checkpoint_models else {}
    return {"model": model, "checkpoints": [[step, *made] for step, made in sorted(checkpoints.items())]}


def _promote(desk: Desk, job: Job, accepted: dict[str, Any]) -> None:
    """Put what was accepted into service; the job has then succeeded."""
    output, model = f"{job_prefix(job)}/output", accepted["model"]
    for step, model_id, metrics in accepted["checkpoints"]:
        _into_service(desk, job, model_id, f"{output}/step-{step}", suffix_of(job, step))
        desk.catalogue.checkpoints.add(
            job.tenant_id, job.id, step_number=step, metrics=metrics, fine_tuned_model_checkpoint=model_id
        )
    results = _results_file(desk, job, f"{output}/result.csv")
    _into_service(desk, job, model, f"{output}/adapter", suffix_of(job))
    desk.catalogue.runs.take(job, [Line("model", f"New fine-tuned model created: {model}")])
    desk.catalogue.jobs.move(
        job.id,
        {"running"},
        "succeeded",
        event="The job has successfully completed",
        deliver="fine_tuning.job.succeeded",
        attempt=job.attempt,
        fine_tuned_model=model,
        trained_tokens=job.tokens,
        result_files=results,
        estimated_finish=None,
    )


def _into_service(desk: Desk, job: Job, model_id: str, prefix: str, suffix: str) -> None:
    registry = Registry(desk.store)
    try:
        registry.promote(model_id)
    except NotFoundError:
        # Another job that made the same bytes, and ended without a model, removed them: enter them once more.
        desk.accept(_work(desk, job, prefix, suffix))
        registry.promote(model_id)


def suffix_of(job: Job, step: int | None = None) -> str:
    """The suffix of a job's model, or of the checkpoint of a step: `<suffix>-step-<n>`, cut to what a name may hold."""
    name = job.suffix or f"job-{job.id.removeprefix('ftjob-')[:8]}"
    tail = "" if step is None else f"-step-{step}"
    return name[: _LONGEST_SUFFIX - len(tail)] + tail


def clean(desk: Desk, job: Job) -> None:
    """Remove what a job that has ended left in the store, and see that none of its processes runs."""
    for attempt in range(1, job.attempt + 1):
        desk.paces.pop((job.id, attempt), None)
        try:
            desk.launcher.stop(submission_id(job, attempt))
            desk.launcher.forget(submission_id(job, attempt))
        except NotFoundError:
            continue
    registry = Registry(desk.store)
    for model_id in desk.entered.get(job.id, ()):
        registry.remove(model_id)
    desk.store.delete_prefix(job_prefix(job))
    desk.catalogue.runs.cleaned(job.id)
    desk.entered.pop(job.id, None)


def _model(desk: Desk, job: Job, prefix: str, suffix: str) -> str:
    """The id of an accepted adapter in the registry, where it is not promoted yet.

    Raises:
        AdapterRejectedError: with every reason.
    """
    outcome = desk.accept(_work(desk, job, prefix, suffix))
    if outcome.model_id is None:
        raise AdapterRejectedError("the adapter is rejected", outcome.reasons)
    desk.entered[job.id].add(outcome.model_id)
    desk.canary(outcome.model_id)
    return outcome.model_id


def _work(desk: Desk, job: Job, prefix: str, suffix: str) -> AcceptanceWork:
    return AcceptanceWork(
        store=desk.store.url,
        prefix=prefix,
        tenant=desk.catalogue.tenants.get(job.tenant_id).name,
        suffix=suffix,
        limits=desk.limits,
        **{name: job.bundle[name] for name in ("model", "version", "bundle_id")},
    )


def _checkpoint_models(desk: Desk, job: Job, output: str) -> dict[int, tuple[str, dict[str, float]]]:
    """Model id and figures of each accepted checkpoint, by its step; of a rejected one the customer is told."""
    models: dict[int, tuple[str, dict[str, float]]] = {}
    for event in desk.catalogue.runs.taken(job.id, "run:"):
        data = event.data or {}
        match = _STEP_FOLDER.fullmatch(str(data.get("folder", "")))
        if match is None:
            continue
        step = int(data["step"])
        try:
            models[step] = _model(desk, job, f"{output}/{match[0]}", suffix_of(job, step)), data["metrics"]
        except AdapterRejectedError as error:
            told = for_customers(f"The checkpoint of step {step} cannot be served: {'; '.join(error.reasons)}")
            desk.catalogue.runs.take(job, [Line(f"checkpoint:{step}", told, level="warn")])
    return models


def _results_file(desk: Desk, job: Job, key: str) -> list[str]:
    """The results as a file of the tenant's; its id follows from the job's, so that a repetition makes no second."""
    try:
        if desk.store.info(key).size > _MOST_RESULT_BYTES:
            return []
    except NotFoundError:
        return []
    file_id = f"file-{hashlib.sha256(f'{job.id}/results'.encode()).hexdigest()[:24]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.csv")
        desk.store.download(key, path)
        data = path.read_bytes()
        file = keep_file(
            desk.catalogue,
            desk.store,
            path,
            tenant_id=job.tenant_id,
            filename=f"step_metrics_{job.id}.csv",
            purpose="fine-tune-results",
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            file_id=file_id,
        )
    return [file.id]
