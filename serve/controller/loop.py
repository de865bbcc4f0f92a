"""The controller: in rounds, it takes every job one step further, and does what falls due.

A plain class; where it runs, and how often, is decided by whoever calls `tick`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import uuid4

from ot_ray.artifacts import InspectionLimits
from ot_ray.launch import JobLauncher, JobSpec
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.catalogue.records import Job
from serve.controller.acceptance import AcceptanceWork, Outcome
from serve.controller.background import Background
from serve.controller.checking import check
from serve.controller.desk import Desk
from serve.controller.finishing import clean, finish
from serve.controller.patience import Patience, is_known, kind_of
from serve.controller.retired import RetiredModels
from serve.controller.starting import launch, take_turns
from serve.controller.watching import watch
from serve.settings.jobs import JobsConfig

_log = logging.getLogger(__name__)
_LEASE = "controller"
_CLEAN = "clean "
_GIVEN_UP = "The service could not go on with the job. Try again."

Chore = Callable[[], object]


class Controller:
    """Takes jobs from `validating_files` to their end.

    Several may run at once, on one machine or many: one of them leads, by a lease in the database, and takes rounds;
    every change is a compare-and-set besides, so that a leader that slept too long does no harm.

    Args:
        accept: inspects an adapter and enters it into the registry; `acceptance.accept`, wherever it is run.
        canary: runs a plug-in on an engine; raises AdapterRejectedError.
        prepare: fills a job's part of the store and the folder that it is shipped with, and says how it is run.
        limits: what an adapter may be like; None for the usual.
        chores: what is done in every round beside the jobs, by name: offsite uploads, webhooks.
        sweeps: what is done every `settings.sweep_s` seconds, by name, beside forgetting old keys, counts and models.
        clock: seconds since 1970, as the catalogue has them.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: Store,
        launcher: JobLauncher,
        settings: JobsConfig,
        *,
        accept: Callable[[AcceptanceWork], Outcome],
        canary: Callable[[str], object],
        prepare: Callable[[Job, Path], JobSpec],
        limits: InspectionLimits | None = None,
        chores: dict[str, Chore] | None = None,
        sweeps: dict[str, Chore] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._desk = Desk(
            catalogue, store, launcher, settings, accept, canary, prepare, limits or InspectionLimits(), clock
        )
        self._chores = chores or {}
        self._sweeps: dict[str, Chore] = {
            "keys": catalogue.idempotency.sweep,
            "counts": catalogue.counts.sweep,
            "models": RetiredModels(self._desk).sweep,
            **(sweeps or {}),
        }
        self._holder = uuid4().hex
        kinds = ("validating", "launching", "watching", "finishing", "cleaning")
        # None of the rest ever waits for another.
        rest = len(self._chores) + len(self._sweeps)
        self._background = Background({**dict.fromkeys(kinds, settings.background), "chores": rest})
        self._patience = Patience(clock)
        self._swept_at = 0.0

    def tick(self) -> bool:
        """One round; slow steps go on in threads of this process after it returns.

        Returns:
            Whether this controller leads; nothing is done if it does not.

        Raises:
            DatabaseUnavailableError: the database did not answer; the next round may find it again.
        """
        desk = self._desk
        if not desk.catalogue.leases.take(_LEASE, self._holder, int(desk.settings.lease_s) + 1):
            return False
        take_turns(desk)
        for job in desk.catalogue.jobs.with_status("validating_files", "running"):
            self._begin(job)
        self._clean()
        for name, chore in self._chores.items():
            self._begin_chore(f"chore {name}", chore)
        if desk.clock() >= self._swept_at + desk.settings.sweep_s:
            self._swept_at = desk.clock()
            for name, sweep in self._sweeps.items():
                self._begin_chore(f"sweep {name}", sweep)
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the steps that rounds have begun; whether all are done."""
        return self._background.wait(timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Let another controller lead, and wait for what is under way; whether that is done.

        Args:
            timeout_s: how long to wait; None for as long as it takes.
        """
        try:
            self._desk.catalogue.leases.release(_LEASE, self._holder)
        finally:
            done = self._background.close(timeout_s)
        return done

    def _begin(self, job: Job) -> None:
        # Where nothing of the job runs, its cancelling need not wait until the trouble is over.
        heard = job.wanted == "cancel" and (job.status == "validating_files" or job.stage == "accepting")
        if not heard and not self._patience.ready(job.id):
            return
        work = partial(self._step, job.id)
        if heard:
            self._background.begin(job.id, work, "watching")
        elif job.status == "validating_files":
            # Of each tenant one at a time, so that they take turns.
            self._background.begin(job.id, work, "validating", owner=job.tenant_id)
        else:
            kind = {"launching": "launching", "training": "watching"}.get(job.stage or "", "finishing")
            self._background.begin(job.id, work, kind)

    def _step(self, job_id: str) -> None:
        try:
            _step(self._desk, self._desk.catalogue.jobs.find(job_id))
        except Exception as error:
            if self._failed(job_id, error):
                self._give_up(job_id)
        else:
            self._patience.went_well(job_id)

    def _clean(self) -> None:
        """Begin to remove what ended jobs left; those with which it failed come last, and after a pause."""
        runs = self._desk.catalogue.runs
        troubled = {name.removeprefix(_CLEAN) for name in self._patience.in_trouble() if name.startswith(_CLEAN)}
        jobs = runs.uncleaned(without=troubled)
        if not jobs and troubled:
            jobs = runs.uncleaned(without={job_id for job_id in troubled if not self._patience.ready(_CLEAN + job_id)})
        for job in jobs:
            work = partial(self._guarded, _CLEAN + job.id, partial(clean, self._desk, job))
            self._background.begin(job.id, work, "cleaning")

    def _begin_chore(self, name: str, chore: Chore) -> None:
        self._background.begin(name, partial(self._guarded, name, chore), "chores")

    def _guarded(self, name: str, work: Chore) -> None:
        try:
            work()
        except Exception as error:
            self._failed(name, error)
        else:
            self._patience.went_well(name)

    def _failed(self, name: str, error: Exception) -> bool:
        """Note a failure; whether it was one too many."""
        if is_known(error):
            _log.warning("%s has to wait: %s", name, error)
        else:
            _log.error("%s could not go on", name, exc_info=error)
        return self._patience.failed(name, kind_of(error))

    def _give_up(self, name: str) -> None:
        """A job that the controller itself cannot handle must not stay as it is for ever."""
        try:
            job = self._desk.catalogue.jobs.find(name)
            # One whose model may be in service already can only succeed.
            if job.status == "validating_files" or (job.status == "running" and job.stage != "promoting"):
                self._desk.fail(job, "server_error", _GIVEN_UP)
                self._patience.went_well(name)
        except Exception:
            _log.exception("%s could not be given up", name)


def _step(desk: Desk, job: Job) -> None:
    if job.status == "validating_files":
        check(desk, job)
    elif job.status != "running":
        return
    elif job.stage == "launching":
        launch(desk, job)
    elif job.stage == "training":
        watch(desk, job)
    else:
        finish(desk, job)
