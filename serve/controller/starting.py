"""From the queue to a running process: turns, attempts, and the submission that is safe to repeat.

Which job is next is queue.py's; what a job is given is job_folder.py's."""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from ot_ray.errors import AlreadyExistsError, ArtifactError, DataError, LaunchError, NotFoundError
from serve.catalogue.records import Job
from serve.catalogue.runs import Line
from serve.controller.credentials import first_use_s
from serve.controller.desk import Desk
from serve.controller.queue import Share, Waiting, choose

_log = logging.getLogger(__name__)
_DAY_S = 24 * 3600
_TELL_PENDING_S = 60


def take_turns(desk: Desk) -> None:
    """Take the jobs whose turn it is out of the queue, into `launching`."""
    waiting = {job.id: job for job in desk.catalogue.jobs.waiting() if _still_wanted(desk, job)}
    if not waiting:
        return
    shares = _shares(desk)
    # Tokens of a job are taken once, however often it is paused.
    queue = [Waiting(job.id, job.tenant_id, (job.tokens or 0) if job.attempt == 0 else 0) for job in waiting.values()]
    turn = choose(queue, shares, desk.settings.max_running)
    for item in turn.start:
        job = waiting[item.job_id]
        event = "Fine-tuning job started" if job.attempt == 0 else "Fine-tuning job resumed"
        per_day = shares[item.tenant_id].tokens_per_day
        desk.catalogue.runs.begin(job, submission_id(job, job.attempt + 1), event, charge=item.tokens, per_day=per_day)
    for item in turn.out_of_tokens:
        _tell_out_of_tokens(desk, waiting[item.job_id])


def submission_id(job: Job, attempt: int) -> str:
    """The launcher's name of an attempt."""
    return job.id if attempt == 1 else f"{job.id}-{attempt}"


def launch(desk: Desk, job: Job) -> None:
    """Take a job in `launching` to `training`, once its process runs.

    May be repeated from any point: the launcher takes a submission id once.
    """
    status = status_of(desk, job)
    if job.wanted != "run":
        stop(desk, job)
        set_aside(desk, job)
    elif status is None:
        _submit(desk, job)
    elif status == "failed" and desk.launcher.found_no_room(job.submission_id or job.id):
        # Nothing of it ran, so that no attempt is counted as lost.
        desk.catalogue.runs.begin_again(job, submission_id(job, job.attempt + 1), _no_room(job))
    elif status in ("pending", "stopped") and _is_late(desk, job):
        # It would begin with credentials that are over. Ray stops what is pending when it begins, which may be later.
        stop(desk, job)
        desk.catalogue.runs.begin_again(job, submission_id(job, job.attempt + 1), _no_room(job))
    elif status != "pending":
        desk.catalogue.runs.to_stage(job, "training", expected={"launching"}, launched_at=int(desk.clock()))
    elif job.launched_at is not None and desk.clock() > job.launched_at + _TELL_PENDING_S:
        desk.catalogue.runs.take(job, [_no_room(job)])


def status_of(desk: Desk, job: Job) -> str | None:
    """What the launcher says of the present attempt; None if it does not know it."""
    try:
        return desk.launcher.status(job.submission_id or job.id)
    except NotFoundError:
        return None


def stop(desk: Desk, job: Job) -> None:
    """End the present attempt's process, and wait until it is gone."""
    with suppress(NotFoundError):
        desk.launcher.stop(job.submission_id or job.id)


def set_aside(desk: Desk, job: Job) -> None:
    """Cancel or pause a job whose process is gone, as its owner wants."""
    if job.wanted == "cancel":
        desk.cancel(job)
    else:
        desk.pause(job)


def lost(desk: Desk, job: Job, why: str) -> None:
    """The cluster lost an attempt: begin the next one, or fail the job if it has had all."""
    source = f"lost:{job.attempt:06d}"
    before = [event for event in desk.catalogue.runs.taken(job.id, "lost:") if event.source_key != source]
    if len(before) + 1 >= desk.settings.attempts:
        times = f"{len(before) + 1} times" if before else "once"
        desk.fail(job, "server_error", f"The cluster lost the job {times}, the last time because {why}. Try again.")
        return
    line = Line(source, f"The cluster lost the job: {why}. It goes on from its last checkpoint.", level="warn")
    desk.catalogue.runs.begin_again(job, submission_id(job, job.attempt + 1), line)


def died(desk: Desk, job: Job, ended: int, step: int) -> None:
    """A run's process ended by itself without a step further than earlier runs: begin the next one, or, where as many
    in a row did so as a job has runs, fail the job and say how they ended.

    What takes the process with it, such as its memory, is the job's own failure; a process that leaves by itself, and
    does not say that its data or settings are why, has trouble with its machine.

    Args:
        ended: its exit status, -n for the signal n.
        step: the furthest step of all runs.
    """
    how = f"exit status {ended}" if ended >= 0 else f"killed by signal {-ended}"
    source, place = f"died:{job.attempt:06d}", f"after step {step}" if step else "before its first step"
    events = desk.catalogue.runs.taken(job.id, "died:")
    here = [event for event in events if event.source_key != source and (event.data or {}).get("step") == step]
    if len(here) + 1 >= desk.settings.attempts:
        times = f"each time, {len(here) + 1} times in a row" if here else "once"
        code = "training_failed" if ended < 0 else "server_error"
        desk.fail(job, code, f"Its process ended by itself {place}, {times}: {how}.")
        return
    told = (
        f"The job's process ended by itself {place}: {how}. It is begun again, from its last checkpoint if it has one."
    )
    line = Line(source, told, level="warn", data={"step": step})
    desk.catalogue.runs.begin_again(job, submission_id(job, job.attempt + 1), line)


def _submit(desk: Desk, job: Job) -> None:
    late = job.launched_at is not None and desk.clock() > job.launched_at + desk.settings.launch_s
    if job.attempt > 1:
        # Where an earlier attempt was lost from sight and still runs, two would write.
        with suppress(NotFoundError):
            desk.launcher.stop(submission_id(job, job.attempt - 1))
    with tempfile.TemporaryDirectory() as folder:
        try:
            spec = desk.prepare(job, Path(folder))
        except (NotFoundError, ArtifactError, DataError) as error:
            desk.fail(job, "invalid_request", f"The job cannot be started: {error}")
            return
        # It may have been cancelled, or lost and begun again, while its folder was filled.
        now = desk.catalogue.jobs.find(job.id)
        if (now.status, now.stage, now.attempt, now.wanted) != ("running", "launching", job.attempt, "run"):
            return
        try:
            desk.launcher.submit(spec)
        except AlreadyExistsError:
            pass
        except LaunchError as error:
            _log.warning("job %s was not taken by the launcher: %s", job.id, error)
            if late:
                lost(desk, job, "it could not be started")


def _is_late(desk: Desk, job: Job) -> bool:
    return job.launched_at is not None and desk.clock() > job.launched_at + first_use_s(desk.store)


def _no_room(job: Job) -> Line:
    return Line(f"pending:{job.attempt}", "The job waits until the cluster has room for it.")


def _still_wanted(desk: Desk, job: Job) -> bool:
    if job.wanted != "run":
        set_aside(desk, job)
    return job.wanted == "run"


def _shares(desk: Desk) -> dict[str, Share]:
    starts, spent = desk.catalogue.runs.last_starts(), desk.catalogue.runs.spent_today()
    running: dict[str, int] = {}
    for job in desk.catalogue.jobs.running():
        running[job.tenant_id] = running.get(job.tenant_id, 0) + 1
    return {
        tenant.id: Share(
            running_jobs=tenant.limits.running_jobs if tenant.disabled_at is None else 0,
            tokens_per_day=tenant.limits.tokens_per_day,
            running=running.get(tenant.id, 0),
            spent=spent.get(tenant.id, 0),
            last_start=starts.get(tenant.id, 0),
        )
        for tenant in desk.catalogue.tenants.list()
    }


def _tell_out_of_tokens(desk: Desk, job: Job) -> None:
    tomorrow = (desk.catalogue.now() // _DAY_S + 1) * _DAY_S
    until = datetime.fromtimestamp(tomorrow, timezone.utc)
    message = (
        f"The job trains on {job.tokens} tokens, more than are left of today's limit; it waits in the queue until "
        f"{until:%Y-%m-%d %H:%M} UTC at least."
    )
    desk.catalogue.runs.take(job, [Line(f"tokens:{tomorrow // _DAY_S}", message)])
