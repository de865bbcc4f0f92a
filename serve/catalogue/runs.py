"""What the job controller asks of the jobs' table, for all tenants: starts, attempts, and what attempts report.

Statuses change by the same compare-and-set as everywhere (jobs.py); this adds what must be true with them."""

from __future__ import annotations

import builtins
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa

from serve.catalogue import schema
from serve.catalogue.database import Database
from serve.catalogue.events import append, lock_job
from serve.catalogue.jobs import change_status
from serve.catalogue.records import ENDED, Job, JobEvent, JobStatus, Stage, record

_table, _events, _tokens = schema.jobs, schema.job_events, schema.token_counts
_job, _event = partial(record, Job), partial(record, JobEvent)
_DAY_S = 24 * 3600


@dataclass(frozen=True)
class Line:
    """A line of a job's history; the second from the same source is left out."""

    source_key: str
    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] | None = None


class _NoTokensError(Exception):
    """Undoes a transaction."""


class Runs:
    """The jobs' table as the controller sees it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def last_starts(self) -> dict[str, int]:
        """When a job of each tenant was launched last; tenants that never had one are left out."""
        query = sa.select(_table.c.tenant_id, sa.func.max(_table.c.launched_at)).group_by(_table.c.tenant_id)
        with self._database.read() as connection:
            return {tenant: int(when) for tenant, when in connection.execute(query) if when is not None}

    def spent_today(self) -> dict[str, int]:
        """Tokens of today that each tenant has used."""
        today = self._database.now() // _DAY_S
        query = sa.select(_tokens.c.tenant_id, _tokens.c.tokens).where(_tokens.c.day == today)
        with self._database.read() as connection:
            return {tenant: int(tokens) for tenant, tokens in connection.execute(query)}

    def begin(self, job: Job, submission_id: str, event: str, *, charge: int, per_day: int) -> bool:
        """Take a job from the queue into its next attempt, and its tokens from the tenant's day; both or neither.

        More than a whole day's tokens at once are taken on a day of which none are used.

        Returns:
            Whether it took place; False if the job is not queued any more, not wanted, or the tokens do not suffice.
        """
        now = self._database.now()
        where = [_table.c.attempt == job.attempt, _table.c.wanted == "run"]
        fields = {"stage": "launching", "attempt": job.attempt + 1, "submission_id": submission_id, "launched_at": now}
        started = sa.func.coalesce(_table.c.started_at, now)
        try:
            with self._database.write() as connection:
                if not change_status(
                    connection,
                    now,
                    job.id,
                    {"queued"},
                    "running",
                    event=event,
                    where=where,
                    started_at=started,
                    **fields,
                ):
                    return False
                if charge and not self._charge(connection, job.tenant_id, now // _DAY_S, charge, per_day):
                    raise _NoTokensError
        except _NoTokensError:
            return False
        return True

    def begin_again(self, job: Job, submission_id: str, line: Line) -> bool:
        """Take a running job, whose attempt was lost, into its next one; False if it is in that one, or has ended."""
        change = self._same(job).values(
            stage="launching",
            attempt=job.attempt + 1,
            submission_id=submission_id,
            launched_at=self._database.now(),
            estimated_finish=None,
        )
        with self._database.write() as connection:
            if connection.execute(change.returning(_table.c.id)).one_or_none() is None:
                return False
            self._append(connection, job.id, [line])
            return True

    def pause(self, job: Job, event: str) -> bool:
        """Put a job aside if that is still wanted and it is in the status and the attempt that it was."""
        where = [_table.c.attempt == job.attempt, _table.c.wanted == "pause"]
        fields: dict[str, Any] = {"stage": None, "wanted": "run", "estimated_finish": None}
        with self._database.write() as connection:
            now = self._database.now()
            return change_status(connection, now, job.id, {job.status}, "paused", event=event, where=where, **fields)

    def end(self, job: Job, to: JobStatus, event: str, **told: Any) -> bool:
        """End a job that is in the status, the attempt and the stage that it was; `told` is as `Jobs.move` takes it."""
        where = [_table.c.attempt == job.attempt, _table.c.stage.is_not_distinct_from(job.stage)]
        with self._database.write() as connection:
            now = self._database.now()
            return change_status(connection, now, job.id, {job.status}, to, event=event, where=where, **told)

    def to_stage(
        self, job: Job, stage: Stage, *, expected: Collection[Stage], unless_cancelled: bool = False, **fields: Any
    ) -> bool:
        """Take the present attempt of a running job to another stage; False if it is in none of the expected ones.

        Args:
            unless_cancelled: also False if the customer wants the job cancelled.
        """
        change = self._same(job).where(_table.c.stage.in_(expected))
        if unless_cancelled:
            change = change.where(_table.c.wanted != "cancel")
        with self._database.write() as connection:
            done = connection.execute(change.values(stage=stage, **fields).returning(_table.c.id))
            return done.one_or_none() is not None

    def take(self, job: Job, lines: Sequence[Line]) -> bool:
        """Add what an attempt reported to its job's history, in order; nothing of an attempt that is over."""
        with self._database.write() as connection:
            lock_job(connection, job.id)
            same = sa.select(_table.c.id).where(*_is(job), _table.c.status.not_in(ENDED))
            if connection.execute(same).one_or_none() is None:
                return False
            self._append(connection, job.id, lines)
            return True

    def last_source(self, job_id: str, prefix: str) -> str:
        """The last of the sources with this prefix that a job's history was taken from; empty if none was."""
        query = sa.select(sa.func.max(_events.c.source_key)).where(_events.c.job_id == job_id, _from(prefix))
        with self._database.read() as connection:
            return connection.execute(query).scalar_one_or_none() or ""

    def taken(self, job_id: str, prefix: str) -> builtins.list[JobEvent]:
        """The lines of a job's history that come from sources with this prefix, the first first."""
        query = sa.select(_events).where(_events.c.job_id == job_id, _from(prefix)).order_by(_events.c.seq)
        with self._database.read() as connection:
            return [_event(row) for row in connection.execute(query).mappings()]

    def uncleaned(self, limit: int = 20, *, without: Collection[str] = ()) -> builtins.list[Job]:
        """Jobs that have ended and whose remains have not been removed, `without` some, the first that ended first."""
        query = sa.select(_table).where(_table.c.cleaned_at.is_(None), _table.c.status.in_(ENDED))
        if without:
            query = query.where(_table.c.id.not_in(without))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(_table.c.finished_at).limit(limit)).mappings()
            return [_job(row) for row in rows]

    def cleaned(self, job_id: str) -> None:
        """Note that nothing is left of a job that has ended."""
        change = sa.update(_table).where(_table.c.id == job_id, _table.c.status.in_(ENDED))
        with self._database.write() as connection:
            connection.execute(change.values(cleaned_at=self._database.now(), submission_id=None))

    def _charge(self, connection: sa.Connection, tenant_id: str, day: int, tokens: int, per_day: int) -> bool:
        spent = self._database.insert(_tokens).values(tenant_id=tenant_id, day=day, tokens=0)
        connection.execute(spent.on_conflict_do_nothing(index_elements=["tenant_id", "day"]))
        fits = sa.or_(_tokens.c.tokens + tokens <= per_day, _tokens.c.tokens == 0)
        take = sa.update(_tokens).where(_tokens.c.tenant_id == tenant_id, _tokens.c.day == day, fits)
        taken = take.values(tokens=_tokens.c.tokens + tokens).returning(_tokens.c.tokens)
        return connection.execute(taken).one_or_none() is not None

    def _same(self, job: Job) -> sa.Update:
        return sa.update(_table).where(*_is(job), _table.c.status == "running")

    def _append(self, connection: sa.Connection, job_id: str, lines: Sequence[Line]) -> None:
        now = self._database.now()
        for line in lines:
            append(
                connection,
                job_id,
                line.message,
                now,
                level=line.level,
                type=line.type,
                data=line.data,
                source_key=line.source_key,
            )


def _is(job: Job) -> tuple[sa.ColumnElement[bool], ...]:
    return _table.c.id == job.id, _table.c.attempt == job.attempt


def _from(prefix: str) -> sa.ColumnElement[bool]:
    return _events.c.source_key.startswith(prefix, autoescape=True)
