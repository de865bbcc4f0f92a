"""What a job may do with the service's S3 store: read its bundle and its inputs, write into its own folders.

The session itself is made in the store room; a job of a local store gets a folder and no credentials."""

from __future__ import annotations

from pathlib import Path

from ot_ray.errors import ConfigError
from ot_ray.store.s3 import S3Store
from ot_ray.store.s3_credentials import Grant, assume_role
from serve.catalogue.records import Job
from serve.settings.jobs import JobsConfig

FILE = "credentials"
"""Name of the credentials file in a job's working folder."""


def job_grant(job: Job) -> Grant:
    """The folders of the store that a job needs, and what it does in each."""
    own = f"jobs/{job.id}"
    return Grant(
        read=[f"bundles/{job.bundle['model']}/{job.bundle['version']}", own],
        write=[f"{own}/events", f"{own}/output", f"{own}/checkpoints"],
        delete=[f"{own}/checkpoints"],
        list=[own],
    )


def write_credentials(store: S3Store, job: Job, settings: JobsConfig, folder: Path, seconds: float) -> None:
    """Put credentials into a job's working folder, good for these seconds and for nothing but its grant.

    Raises:
        ConfigError: no role is set, or it cannot be assumed for so long.
        StoreError, StoreUnavailableError: the role is refused, or nobody answers.
    """
    if settings.role_arn is None:
        raise ConfigError(
            "jobs.role_arn is not set, but the store is on S3, where a job gets credentials for its own folder only; "
            "set the role that such credentials are made from"
        )
    session = assume_role(
        store.address, settings.role_arn, job.id, job_grant(job), seconds, endpoint_url=settings.sts_endpoint
    )
    session.write(folder / FILE)
