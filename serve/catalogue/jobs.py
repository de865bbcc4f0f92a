"""Tuning jobs as rows with an explicit state machine; every change of status is one compare-and-set.

What the statuses lead to is the controller's to know."""

from __future__ import annotations

import builtins
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal, cast

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database, page
from serve.catalogue.events import append
from serve.catalogue.records import ENDED, Job, JobStatus, Page, Stage, Wanted, new_id, record
from serve.catalogue.webhooks import announce

_table = schema.jobs
_job = partial(record, Job)
_WAITING: tuple[JobStatus, ...] = ("validating_files", "queued")
_HELD: tuple[JobStatus, ...] = (*_WAITING, "paused")


class Jobs:
    """The table of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: str,
        *,
        model: str,
        bundle: dict[str, Any],
        training_file: str,
        seed: int,
        method: dict[str, Any],
        hyperparameters: dict[str, Any],
        validation_file: str | None = None,
        suffix: str | None = None,
        metadata: dict[str, str] | None = None,
        job_id: str | None = None,
        most_waiting: int | None = None,
        audit: Note | None = None,
    ) -> Job | None:
        """Add a job in `validating_files` with its first event; one that is there under the same id is returned.

        Args:
            job_id: the id to give; None makes one.
            most_waiting: jobs of the tenant that may wait or be paused, this one included; None for no limit.

        Returns:
            The job, or None if the tenant has `most_waiting` of them already; nothing is added then.
        """
        now = self._database.now()
        row = {
            "id": job_id or new_id("ftjob-"),
            "tenant_id": tenant_id,
            "status": "validating_files",
            "wanted": "run",
            "attempt": 0,
            "model": model,
            "suffix": suffix,
            "seed": seed,
            "method": method,
            "hyperparameters": hyperparameters,
            "training_file": training_file,
            "validation_file": validation_file,
            "metadata": metadata,
            "created_at": now,
            "result_files": [],
            "bundle": bundle,
        }
        with self._database.write() as connection:
            _in_turn(connection, tenant_id)
            mine = sa.select(_table).where(_table.c.id == row["id"], _table.c.tenant_id == tenant_id)
            there = connection.execute(mine).mappings().one_or_none()
            if there is not None:
                return _job(there)
            if most_waiting is not None and _count(connection, tenant_id, _HELD) >= most_waiting:
                return None
            made = connection.execute(sa.insert(_table).values(row).returning(_table)).mappings().one()
            pairs = [{"job_id": row["id"], "key": key, "value": value} for key, value in (metadata or {}).items()]
            if pairs:
                connection.execute(sa.insert(schema.job_metadata), pairs)
            append(connection, row["id"], f"Created fine-tuning job: {row['id']}", now)
            note(connection, now, audit, row["id"])
            return _job(made)

    def get(self, tenant_id: str, job_id: str) -> Job:
        """A tenant's job. Raises NotFoundError."""
        return self._one(job_id, _table.c.tenant_id == tenant_id)

    def find(self, job_id: str) -> Job:
        """A job of whichever tenant, for the controller. Raises NotFoundError."""
        return self._one(job_id)

    def list(
        self,
        tenant_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """A tenant's jobs, the newest first. Raises NotFoundError for an unknown `after`.

        Args:
            metadata: pairs that the jobs must have.
            without_metadata: only jobs that were given none.
        """
        where = [_table.c.tenant_id == tenant_id]
        if without_metadata:
            where.append(_table.c.metadata.is_(None))
        pairs = schema.job_metadata
        for key, value in (metadata or {}).items():
            has = sa.select(pairs.c.job_id).where(
                pairs.c.job_id == _table.c.id, pairs.c.key == key, pairs.c.value == value
            )
            where.append(has.exists())
        with self._database.read() as connection:
            return page(connection, _table, where, _job, after=after, limit=limit)

    def with_status(self, *statuses: JobStatus) -> builtins.list[Job]:
        """Jobs of all tenants in any of these statuses, the first made first."""
        query = sa.select(_table).where(_table.c.status.in_(statuses))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(_table.c.created_at, _table.c.position)).mappings()
            return [_job(row) for row in rows]

    def waiting(self) -> builtins.list[Job]:
        """Queued jobs of all tenants, the first made first."""
        return self.with_status("queued")

    def running(self) -> builtins.list[Job]:
        """Running jobs of all tenants, the first made first."""
        return self.with_status("running")

    def resume(
        self, tenant_id: str, job_id: str, *, event: str, most_waiting: int, audit: Note | None = None
    ) -> Literal["resumed", "full", "changed"]:
        """Put a tenant's paused job into the queue again, if fewer than `most_waiting` of its jobs wait.

        Returns:
            `full` if as many wait already, `changed` if the job is not paused; nothing is changed then.
        """
        with self._database.write() as connection:
            _in_turn(connection, tenant_id)
            if _count(connection, tenant_id, _WAITING) >= most_waiting:
                return "full"
            now, mine = self._database.now(), [_table.c.tenant_id == tenant_id]
            fields: dict[str, Any] = {"wanted": "run", "queued_at": now, "audit": audit}
            moved = change_status(connection, now, job_id, {"paused"}, "queued", event=event, where=mine, **fields)
            return "resumed" if moved else "changed"

    def want(
        self,
        tenant_id: str,
        job_id: str,
        wanted: Wanted,
        *,
        expected: Collection[JobStatus],
        audit: Note | None = None,
    ) -> Job | None:
        """Note what the customer wants of a job; a wish to cancel is never taken back.

        Returns:
            The job after the change, or None if its status was none of the expected ones, or its cancelling is
            wanted already and something else was asked for.

        Raises:
            NotFoundError: the tenant has no such job.
        """
        mine = [_table.c.id == job_id, _table.c.tenant_id == tenant_id]
        change = sa.update(_table).where(*mine, _table.c.status.in_(expected))
        if wanted != "cancel":
            change = change.where(_table.c.wanted != "cancel")
        with self._database.write() as connection:
            row = connection.execute(change.values(wanted=wanted).returning(_table)).mappings().one_or_none()
            if row is None and connection.execute(sa.select(_table.c.id).where(*mine)).one_or_none() is None:
                raise _unknown(job_id)
            if row is not None:
                note(connection, self._database.now(), audit, job_id)
        return None if row is None else _job(row)

    def move(
        self,
        job_id: str,
        expected: Collection[JobStatus],
        to: JobStatus,
        *,
        event: str,
        level: str = "info",
        deliver: str | None = None,
        attempt: int | None = None,
        data: dict[str, Any] | None = None,
        audit: Note | None = None,
        **fields: Any,
    ) -> bool:
        """Change a job's status; together with its event and the webhook deliveries, or not at all.

        Args:
            expected: statuses it may have now; those that end a job are never left.
            event: the line that the job's history gets.
            deliver: the webhook type that the tenant's endpoints are told.
            attempt: the attempt it must be in, so that news of an earlier one changes nothing.
            data: figures of the event.
            fields: further columns to set; a status that ends a job sets `finished_at` by itself.

        Returns:
            Whether it took place; False if the job's status was another.
        """
        where = [] if attempt is None else [_table.c.attempt == attempt]
        with self._database.write() as connection:
            now = self._database.now()
            told: dict[str, Any] = {"event": event, "level": level, "deliver": deliver, "data": data, "audit": audit}
            return change_status(connection, now, job_id, expected, to, where=where, **told, **fields)

    def set_stage(self, job_id: str, stage: Stage, *, expected: Collection[Stage | None], **fields: Any) -> bool:
        """Move a running job from one of the expected stages to another; False if it is in none of them."""
        known = sa.or_(_table.c.stage.in_([one for one in expected if one]), _table.c.stage.is_(None))
        if None not in expected:
            known = _table.c.stage.in_(cast("builtins.list[str]", [*expected]))
        change = sa.update(_table).where(_table.c.id == job_id, _table.c.status == "running", known)
        with self._database.write() as connection:
            moved = connection.execute(change.values(stage=stage, **fields).returning(_table.c.id))
            return moved.one_or_none() is not None

    def note(self, job_id: str, **fields: Any) -> bool:
        """Set columns of a job that has not ended, its status apart; False if it has."""
        if "status" in fields:
            raise ValueError("a status changes by move() alone")
        change = sa.update(_table).where(_table.c.id == job_id, _table.c.status.not_in(ENDED))
        with self._database.write() as connection:
            return connection.execute(change.values(**fields).returning(_table.c.id)).one_or_none() is not None

    def _one(self, job_id: str, *where: sa.ColumnElement[bool]) -> Job:
        query = sa.select(_table).where(_table.c.id == job_id, *where)
        with self._database.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise _unknown(job_id)
        return _job(row)


def _in_turn(connection: sa.Connection, tenant_id: str) -> None:
    """Requests of one tenant at the same time go on one after the other, so that its jobs can be counted."""
    tenants = schema.tenants
    connection.execute(sa.select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update(key_share=True))


def _count(connection: sa.Connection, tenant_id: str, statuses: Collection[JobStatus]) -> int:
    count = sa.select(sa.func.count()).select_from(_table)
    mine = count.where(_table.c.tenant_id == tenant_id, _table.c.status.in_(statuses))
    return int(connection.execute(mine).scalar_one())


def change_status(
    connection: sa.Connection,
    now: int,
    job_id: str,
    expected: Collection[JobStatus],
    to: JobStatus,
    *,
    event: str,
    level: str = "info",
    deliver: str | None = None,
    data: dict[str, Any] | None = None,
    where: builtins.list[sa.ColumnElement[bool]],
    audit: Note | None = None,
    **fields: Any,
) -> bool:
    """`Jobs.move` within a transaction that does more; `where` holds further conditions."""
    values = {"status": to, **({"finished_at": now, "stage": None} if to in ENDED else {}), **fields}
    same = [_table.c.id == job_id, _table.c.status.in_(set(expected) - ENDED), *where]
    change = sa.update(_table).where(*same).values(**values).returning(_table.c.tenant_id)
    tenant_id = connection.execute(change).scalar_one_or_none()
    if tenant_id is None:
        return False
    append(connection, job_id, event, now, level=level, data=data)
    note(connection, now, audit, job_id)
    if deliver is not None:
        announce(connection, tenant_id, deliver, job_id, now)
    return True


def _unknown(job_id: str) -> NotFoundError:
    return NotFoundError(f"no fine-tuning job {job_id[:80]!r}")
