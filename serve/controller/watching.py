"""Watches the process of a running job: reads what it reports, stops it, and tells its own failure from the cluster's.

A finished training goes on in finishing.py."""

from __future__ import annotations

import logging
import signal

from ot_ray.errors import ArtifactError, NotFoundError
from ot_ray.launch.jobs import DONE
from serve.catalogue.records import Job
from serve.catalogue.runs import Line
from serve.controller.desk import Desk, job_prefix
from serve.controller.reports import CheckpointMade, Message, Metrics, Report, for_customers, parse_report, parse_result
from serve.controller.starting import died, lost, set_aside, status_of, stop

# By which a run shows others that it writes; no report.
_CLAIM = "claim"
_LONGEST_S = 10 * 365 * 24 * 3600.0

_log = logging.getLogger(__name__)


def watch(desk: Desk, job: Job) -> None:
    """Look after a job in `training` once."""
    # The status first: a process that has ended has reported all that it will.
    status = status_of(desk, job)
    everything = _read_reports(desk, job)
    if status is None or status in DONE:
        if everything:
            _ended(desk, job, status)
    elif job.wanted != "run":
        _stop(desk, job)
        set_aside(desk, job)
    elif job.launched_at is not None and desk.clock() > job.launched_at + desk.settings.time_limit_s:
        _stop(desk, job)
        _fail_late(desk, job)


def _stop(desk: Desk, job: Job) -> None:
    stop(desk, job)
    # The last words belong to this attempt, not to the next.
    while not _read_reports(desk, job):
        pass


def _ended(desk: Desk, job: Job, status: str | None) -> None:
    if job.wanted == "cancel":
        desk.cancel(job)
    elif _is_complete(desk, job):
        desk.catalogue.runs.to_stage(job, "accepting", expected={"training"}, estimated_finish=None)
    elif (reason := _own_reason(desk, job)) is not None and status == "failed":
        desk.fail(job, "training_failed", reason)
    elif job.wanted == "pause":
        desk.pause(job)
    else:
        _gone(desk, job, status)


def _gone(desk: Desk, job: Job, status: str | None) -> None:
    """Begin again, or give up, where a process has ended neither with a result nor with a reason."""
    ended = None if status is None else desk.launcher.exit_status(job.submission_id or job.id)
    before, now = _furthest(desk, job)
    if ended == -signal.SIGALRM:
        # The alarm that was set when the command was started; it may go off before the controller looks.
        _fail_late(desk, job)
    elif ended is not None and now <= before:
        died(desk, job, ended, before)
    else:
        lost(desk, job, _LOST.get(status or "", "the launcher does not know it any more"))


def _fail_late(desk: Desk, job: Job) -> None:
    desk.fail(job, "time_limit_exceeded", f"The job took longer than {desk.settings.time_limit_s:g} s.")


def _furthest(desk: Desk, job: Job) -> tuple[int, int]:
    """The furthest step of earlier attempts, and that of the present one; 0 where none was taken."""
    mine, steps = _source(job.attempt, ""), {False: 0, True: 0}
    for event in desk.catalogue.runs.taken(job.id, "run:"):
        if event.type == "metrics" and event.data:
            present = (event.source_key or "").startswith(mine)
            steps[present] = max(steps[present], event.data["step"])
    return steps[False], steps[True]


_LOST = {
    "succeeded": "it ended without a result",
    "failed": "its process ended without saying why",
    "stopped": "its process was stopped from outside",
}


def _is_complete(desk: Desk, job: Job) -> bool:
    """Whether the result stands, which is written last, whatever became of the process afterwards."""
    try:
        parse_result(desk.store.read(f"{job_prefix(job)}/output/result.json"))
    except NotFoundError:
        return False
    except ArtifactError as error:
        _log.warning("job %s left an unreadable result: %s", job.id, error)
        return False
    return True


def _own_reason(desk: Desk, job: Job) -> str | None:
    """The error that the present attempt told as its last word."""
    told = desk.catalogue.runs.taken(job.id, _source(job.attempt, ""))
    return told[-1].message if told and told[-1].level == "error" else None


def _source(attempt: int, name: str) -> str:
    return f"run:{attempt:06d}:{name}"


def _read_reports(desk: Desk, job: Job) -> bool:
    """Take a round's worth of what the job reported into its history; whether nothing is left to take."""
    prefix, runs, settings = f"{job_prefix(job)}/events", desk.catalogue.runs, desk.settings
    last = runs.last_source(job.id, "run:").rpartition(":")[2]
    names = [name for key in desk.store.list(prefix) if (name := key.removeprefix(f"{prefix}/")) != _CLAIM]
    new = [name for name in sorted(names) if name > last]
    over = max(0, len(names) - settings.max_events)
    new, dropped = new[: max(0, len(new) - over)], over > 0
    now, later = new[: settings.events_per_tick], new[settings.events_per_tick :]
    lines: list[Line] = []
    latest: Metrics | None = None
    for name in now:
        report = _read(desk, job, f"{prefix}/{name}")
        lines.append(_line(job, name, report))
        latest = report if isinstance(report, Metrics) else latest
    if dropped:
        most = f"More than {settings.max_events} progress reports; further ones are left out."
        lines.append(Line("reports:dropped", most, level="warn"))
    if lines and not runs.take(job, lines):
        # The attempt is over, and what it left belongs to nobody.
        return True
    if latest is not None:
        _estimate(desk, job, latest)
    return not later


def _read(desk: Desk, job: Job, key: str) -> Report | None:
    try:
        if desk.store.info(key).size > desk.settings.event_bytes:
            raise ArtifactError(f"more than {desk.settings.event_bytes} bytes")
        return parse_report(desk.store.read(key))
    except ArtifactError as error:
        _log.warning("job %s: %s is no progress report: %s", job.id, key, error)
        return None


def _line(job: Job, name: str, report: Report | None) -> Line:
    source = _source(job.attempt, name)
    if isinstance(report, Metrics):
        return Line(source, report.text, type="metrics", data=report.figures)
    if isinstance(report, CheckpointMade):
        data = {"step": report.step, "folder": report.folder, "metrics": report.metrics}
        return Line(source, f"Checkpoint created at step {report.step}", data=data)
    if isinstance(report, Message):
        return Line(source, for_customers(report.message), level=report.level)
    return Line(source, "A progress report of the job could not be read.", level="warn")


def _estimate(desk: Desk, job: Job, latest: Metrics) -> None:
    """Note when the training is done if it goes on at the pace that it had since this controller first looked."""
    step, at = desk.paces.setdefault((job.id, job.attempt), (latest.step, latest.at))
    if latest.total_steps is None or latest.step <= step or latest.at <= at:
        return
    left = max(0, latest.total_steps - latest.step) * (latest.at - at) / (latest.step - step)
    desk.catalogue.jobs.note(job.id, estimated_finish=int(desk.clock() + min(left, _LONGEST_S)))
