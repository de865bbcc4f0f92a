"""The history of tuning jobs: lines that are only ever added, numbered without gaps within a job."""

from __future__ import annotations

import builtins
from functools import partial
from typing import Any

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.database import Database, page
from serve.catalogue.records import JobEvent, Page, new_id, record

_table = schema.job_events
_event = partial(record, JobEvent)


class Events:
    """The table of events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        job_id: str,
        message: str,
        *,
        level: str = "info",
        type: str = "message",
        data: dict[str, Any] | None = None,
        source_key: str | None = None,
        created_at: int | None = None,
    ) -> bool:
        """Add a line to a job's history.

        Args:
            source_key: where the event was taken from; the second from the same place is left out.

        Returns:
            Whether it was added.
        """
        with self._database.write() as connection:
            lock_job(connection, job_id)
            when = self._database.now() if created_at is None else created_at
            return append(connection, job_id, message, when, level=level, type=type, data=data, source_key=source_key)

    def list(self, tenant_id: str, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[JobEvent]:
        """Events of a tenant's job, the newest first. Raises NotFoundError for an unknown job or `after`."""
        with self._database.read() as connection:
            require_job(connection, tenant_id, job_id)
            return page(
                connection, _table, [_table.c.job_id == job_id], _event, after=after, limit=limit, by=_table.c.seq
            )

    def sources(self, job_id: str) -> set[str]:
        """The places that events of a job were taken from."""
        query = sa.select(_table.c.source_key).where(_table.c.job_id == job_id, _table.c.source_key.is_not(None))
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def all(self, job_id: str) -> builtins.list[JobEvent]:
        """Every event of a job, the first first."""
        query = sa.select(_table).where(_table.c.job_id == job_id).order_by(_table.c.seq)
        with self._database.read() as connection:
            return [_event(row) for row in connection.execute(query).mappings()]


def lock_job(connection: sa.Connection, job_id: str) -> None:
    """Hold a job's row until the transaction ends, so that its events are numbered one after the other."""
    connection.execute(sa.select(schema.jobs.c.id).where(schema.jobs.c.id == job_id).with_for_update(key_share=True))


def append(
    connection: sa.Connection,
    job_id: str,
    message: str,
    created_at: int,
    *,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
    source_key: str | None = None,
) -> bool:
    """Add an event within a transaction that holds the job's row; False if its source was taken before."""
    if source_key is not None:
        taken = sa.select(_table.c.id).where(_table.c.job_id == job_id, _table.c.source_key == source_key)
        if connection.execute(taken).one_or_none() is not None:
            return False
    last = sa.select(sa.func.coalesce(sa.func.max(_table.c.seq), 0)).where(_table.c.job_id == job_id)
    connection.execute(
        sa.insert(_table).values(
            id=new_id("ftevent-"),
            job_id=job_id,
            seq=connection.execute(last).scalar_one() + 1,
            created_at=created_at,
            level=level,
            type=type,
            message=message,
            data=data,
            source_key=source_key,
        )
    )
    return True


def require_job(connection: sa.Connection, tenant_id: str, job_id: str) -> None:
    """Raise NotFoundError unless the job is the tenant's."""
    jobs = schema.jobs
    mine = sa.select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id)
    if connection.execute(mine).one_or_none() is None:
        raise NotFoundError(f"no fine-tuning job {job_id[:80]!r}")
