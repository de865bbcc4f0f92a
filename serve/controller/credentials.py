"""What a job may do with the service's S3 store, and for how long: minutes at a time, while somebody wants the job.

The session itself is made in the store room; a job of a local store gets a folder and no credentials."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ot_ray.errors import ConfigError, NotFoundError, StoreError, StoreUnavailableError
from ot_ray.store import PatientStore, Store, scoped
from ot_ray.store.s3 import S3Store
from ot_ray.store.s3_credentials import SESSION_S, Grant, assume_role
from ot_ray.store.s3_session import Credentials
from serve.catalogue import Catalogue
from serve.catalogue.records import Job
from serve.settings.jobs import JobsConfig

FILE = "credentials.json"
"""Name of the credentials file in a job's working folder."""

_RENEWED_AT = 1 / 3
"""Share of its life after which a session gets a successor; the rest is the time that a controller may be away."""
_USED_BY = 0.8
"""Share of its life after which a session that nobody uses yet is too old to be begun with."""
_AGAIN_S = 10.0


def job_grant(job: Job) -> Grant:
    """The folders of the store that a job needs, and what it does in each.

    Its next credentials lie in its own folder, where it reads them and cannot write.
    """
    own = f"jobs/{job.id}"
    return Grant(
        read=[f"bundles/{job.bundle['model']}/{job.bundle['version']}", own],
        write=[f"{own}/events", f"{own}/output", f"{own}/checkpoints"],
        delete=[f"{own}/checkpoints"],
        list=[own],
    )


def credentials_key(job: Job) -> str:
    """The object in which a job's present attempt finds its next credentials; no other attempt looks there."""
    return f"jobs/{job.id}/credentials/{job.attempt}.json"


def lend(store: S3Store, job: Job, settings: JobsConfig) -> Credentials:
    """Make credentials that are good for a job's grant, and put them where its present attempt finds them.

    Raises:
        ConfigError: no role is set, or what is set is none.
        StoreError, StoreUnavailableError: the role is refused, or nobody answers.
    """
    if settings.role_arn is None:
        raise ConfigError(
            "jobs.role_arn is not set, but the store is on S3, where a job gets credentials for its own folder only; "
            "set the role that such credentials are made from"
        )
    session = assume_role(store.address, settings.role_arn, job.id, job_grant(job), settings.sts_endpoint)
    key = credentials_key(job)
    # The job's own way to it, not the service's.
    address = store.address.model_copy(update={"credentials": None})
    lent = replace(session, renewal=scoped(S3Store(address), key).url)
    store.write(key, lent.encode())
    return lent


def write_credentials(store: S3Store, job: Job, settings: JobsConfig, path: Path) -> None:
    """Put a job's first credentials into a file. Raises as `lend`, and AlreadyExistsError."""
    lend(store, job, settings).write(path)


def first_use_s(store: Store) -> float:
    """Seconds after its launch within which an attempt must begin, to find its credentials still good."""
    return SESSION_S * _USED_BY if _on_s3(store) else float("inf")


class Renewals:
    """Gives the attempts that run their next credentials, at a third of the present ones' life.

    An attempt that is cancelled, paused, over or lost gets none, and the object that holds its last ones is removed.
    Where they lie is known to the store alone: a controller that starts anew renews at once.

    Args:
        clock: seconds that only grow.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: Store,
        settings: JobsConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogue, self._store, self._settings, self._clock = catalogue, _on_s3(store), settings, clock
        self._due: dict[str, float] = {}

    def step(self) -> None:
        """Renew what is due; one caller at a time.

        Raises:
            ConfigError, StoreError: some could not be renewed; they are tried again soon.
            StoreUnavailableError: nobody answers, so that the rest was not tried.
            DatabaseUnavailableError: the database did not answer.
        """
        if self._store is None:
            return
        wanted = {credentials_key(job): job.id for job in self._catalogue.jobs.with_status("running") if _wanted(job)}
        failed: list[Exception] = []
        for key in sorted({*wanted, *self._due}, key=lambda key: self._due.get(key, 0.0)):
            try:
                if key in wanted:
                    self._renew(self._store, key, wanted[key])
                else:
                    self._store.delete(key)
                    del self._due[key]
            except StoreUnavailableError:
                raise
            except (ConfigError, StoreError) as error:
                # What is wrong with one need not be with the next.
                failed.append(error)
        if failed:
            raise failed[0]

    def _renew(self, store: S3Store, key: str, job_id: str) -> None:
        now = self._clock()
        if now < self._due.get(key, now):
            return
        # While others were renewed, this one may have ended, or gone on to another attempt.
        try:
            job = self._catalogue.jobs.find(job_id)
        except NotFoundError:
            return
        if credentials_key(job) != key or not _wanted(job):
            return
        # Noted first, so that whatever comes of it is removed once it is not wanted.
        self._due[key] = now + _AGAIN_S
        self._due[key] = now + lend(store, job, self._settings).lasts_s * _RENEWED_AT


def _wanted(job: Job) -> bool:
    return job.status == "running" and job.stage in ("launching", "training") and job.wanted == "run"


def _on_s3(store: Store) -> S3Store | None:
    inner = store.inner if isinstance(store, PatientStore) else store
    return inner if isinstance(inner, S3Store) else None
