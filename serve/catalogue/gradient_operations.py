"""Operations of gradient learning: taken in once by number, carried out once in order, by whoever holds their lease.

Leases go by the database's own clock, which is the same for all machines."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database
from serve.catalogue.gradient_claims import UNENDED, claimable, free, until
from serve.catalogue.gradient_refusals import (
    NumberTakenError,
    NumberTooHighError,
    SessionClosedError,
    TooManyQueuedError,
    VersionError,
)
from serve.catalogue.records import (
    GradientKind,
    GradientOperation,
    GradientQueue,
    GradientSession,
    new_id,
    record,
)

_table = schema.gradient_operations
_sessions = schema.gradient_sessions
_auxiliaries = schema.gradient_auxiliaries
_turns = schema.gradient_turns
_operation = partial(record, GradientOperation)
_LOCK = 7_361_905_443  # PostgreSQL's advisory lock of whoever claims; any number that others don't use


class _TakenOverError(Exception):
    pass


class GradientOperations:
    """The table of operations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(
        self,
        session: GradientSession,
        kind: GradientKind,
        number: int,
        digest: str,
        request: dict[str, Any],
        most_queued: int,
        *,
        rows: int = 0,
        version: int | None = None,
        audit: Note | None = None,
    ) -> tuple[GradientOperation, bool]:
        """Take in an operation, once.

        Args:
            digest: of all that was asked. The same number with the same digest gives the operation that is there.
            request: what it takes to carry it out.
            most_queued: operations of the session that may wait or be under way, this one included.
            rows: of text that a pass has to make for it.
            version: of the auxiliary that what was sent is made from; None where that is no matter.

        Returns:
            The operation, and whether it is new.

        Raises:
            NumberTakenError, NumberTooHighError, TooManyQueuedError, SessionClosedError, VersionError: nothing was
                taken in.
        """
        now, mine = self._database.now(), _sessions.c.id == session.id
        with self._database.write() as connection:
            row = connection.execute(sa.select(_sessions).where(mine).with_for_update()).mappings().one()
            there = _numbered(connection, session.id, number)
            if there is not None:
                if (there.kind, there.digest) != (kind, digest):
                    raise NumberTakenError(f"the session has another operation {number}")
                return there, False
            _require_awaited(connection, row, number, most_queued, version)
            values = {
                "id": new_id("colaop_"),
                "session_id": session.id,
                "tenant_id": session.tenant_id,
                "auxiliary_id": session.auxiliary_id,
                "number": number,
                "kind": kind,
                "digest": digest,
                "rows": rows,
                "request": request,
                "status": "queued",
                "created_at": now,
            }
            made = connection.execute(sa.insert(_table).values(values).returning(_table)).mappings().one()
            connection.execute(sa.update(_sessions).where(mine).values(next_number=number + 1, **_used(now)))
            note(connection, now, audit, session.id)
            return _operation(made), True

    def check(self, session: GradientSession, number: int, most_queued: int, version: int | None = None) -> None:
        """Raise what `submit` would raise of a new operation, before it is asked; nothing of a number that was used."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(_sessions).where(_sessions.c.id == session.id)).mappings().one()
            if number >= row["next_number"]:
                _require_awaited(connection, row, number, most_queued, version)

    def find(self, session_id: str, number: int) -> GradientOperation:
        """An operation. Raises NotFoundError."""
        with self._database.read() as connection:
            found = _numbered(connection, session_id, number)
        if found is None:
            raise NotFoundError(f"no operation {number} of session {session_id[:80]!r}")
        return found

    def ahead(self, operation: GradientOperation) -> GradientQueue:
        """What is before an operation; customers take turns, so that it may come earlier or later than that says."""
        place = sa.select(_table.c.position).where(_table.c.id == operation.id).scalar_subquery()
        earlier = [_table.c.status.in_(UNENDED), _table.c.position < place]
        own = sa.case((_table.c.session_id == operation.session_id, 1), else_=0)
        counts = sa.select(
            sa.func.count(), sa.func.coalesce(sa.func.sum(_table.c.rows), 0), sa.func.coalesce(sa.func.sum(own), 0)
        )
        with self._database.read() as connection:
            ahead, rows, before = connection.execute(counts.select_from(_table).where(*earlier)).one()
        return GradientQueue(int(ahead), int(rows), int(before) + 1)

    def claim(self, holder: str, lease_s: float, limit: int) -> list[GradientOperation]:
        """Take on operations to carry out.

        Of each session the first that is not over, if it waits or whoever had it has been silent for its lease, and
        nobody else works on the same auxiliary. Tenants take turns, the one that was served longest ago first; each
        of them gives its oldest operation.

        Args:
            lease_s: seconds after which another may take them, unless they are renewed.
            limit: the most operations.
        """
        now = self._database.shared_now()
        with self._database.write() as connection:
            if not self._database.is_sqlite:
                # Two at once could take one auxiliary's operations from two of its sessions.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            chosen = connection.execute(claimable(holder, now).limit(limit)).all()
            taken = {row.id for row in chosen}
            values = {"status": "running", "holder": holder, "attempt": _table.c.attempt + 1}
            # One that was closed at this very moment is not taken.
            claimed = (
                sa.update(_table)
                .where(_table.c.id.in_(taken), free(now))
                .values(lease_until=until(now, lease_s), **values)
            )
            rows = {row["id"]: row for row in connection.execute(claimed.returning(_table)).mappings()}
            self._give_turns(connection, [row.tenant_id for row in chosen if row.id in rows])
        return [_operation(rows[row.id]) for row in chosen if row.id in rows]

    def renew(self, holder: str, ids: Collection[str], lease_s: float) -> set[str]:
        """Hold on to operations; gives those that are still this holder's."""
        held = [_table.c.id.in_(ids), _table.c.holder == holder, _table.c.status == "running"]
        later = until(self._database.shared_now(), lease_s)
        with self._database.write() as connection:
            renewed = sa.update(_table).where(*held).values(lease_until=later).returning(_table.c.id)
            return set(connection.execute(renewed).scalars())

    def succeed(
        self,
        operation: GradientOperation,
        result: dict[str, Any],
        *,
        version: int | None = None,
        auxiliary_key: str | None = None,
        expected_version: int | None = None,
    ) -> bool:
        """End an operation well, and in the same transaction bring its auxiliary to another version.

        Args:
            operation: as `claim` gave it.
            version: that the auxiliary is brought to; None leaves it as it is.
            auxiliary_key: where the store has the state of that version.
            expected_version: that the auxiliary must have been at, if `version` is given; else what the operation is
                noted to have worked with, the present one where that is not said either.

        Returns:
            False if the operation is no longer this attempt's, or the auxiliary was not at the expected version;
            nothing has changed then.
        """
        noted = expected_version if version is None else version
        try:
            with self._database.write() as connection:
                if version is not None:
                    assert expected_version is not None, "a version comes after another one"
                    _move(connection, operation.auxiliary_id, expected_version, version, auxiliary_key)
                if noted is None:
                    noted = _version(connection, operation.auxiliary_id)
                self._end(connection, operation, status="succeeded", result=result, version=noted)
        except _TakenOverError:
            return False
        return True

    def fail(self, operation: GradientOperation, error: dict[str, Any]) -> bool:
        """End an operation badly; the session goes on. False if it is no longer this attempt's.

        Args:
            error: `{type, message, param, code}`
        """
        try:
            with self._database.write() as connection:
                self._end(connection, operation, status="failed", error=error)
        except _TakenOverError:
            return False
        return True

    def release(self, holder: str) -> None:
        """Give back what a holder that stops has not ended, for others to begin anew."""
        held = sa.update(_table).where(_table.c.holder == holder, _table.c.status == "running")
        with self._database.write() as connection:
            connection.execute(held.values(status="queued", lease_until=None))

    def old_gradients(self, session_id: str, number: int) -> list[GradientOperation]:
        """Give up the gradients that nobody needs once operation `number` is carried out: all but those of the last two
        forward_backward up to it. Gives the operations whose files may go, each once."""
        mine = [_table.c.session_id == session_id, _table.c.kind == "forward_backward"]
        latest = sa.select(_table.c.number).where(*mine, _table.c.number <= number).order_by(_table.c.number.desc())
        last_but_one = latest.limit(1).offset(1).scalar_subquery()
        done = [_table.c.status == "succeeded", _table.c.dropped_at.is_(None)]
        old = sa.update(_table).where(*mine, *done, _table.c.number < last_but_one)
        with self._database.write() as connection:
            rows = connection.execute(old.values(dropped_at=self._database.now()).returning(_table)).mappings().all()
        return sorted((_operation(row) for row in rows), key=lambda operation: operation.number)

    def _end(self, connection: sa.Connection, operation: GradientOperation, **values: Any) -> None:
        now = self._database.now()
        mine = [_table.c.id == operation.id, _table.c.holder == operation.holder, _table.c.status == "running"]
        ended = sa.update(_table).where(*mine, _table.c.attempt == operation.attempt)
        ended = ended.values(request={}, finished_at=now, lease_until=None, **values).returning(_table.c.id)
        if connection.execute(ended).one_or_none() is None:
            raise _TakenOverError
        connection.execute(sa.update(_sessions).where(_sessions.c.id == operation.session_id).values(**_used(now)))

    def _give_turns(self, connection: sa.Connection, tenants: list[str]) -> None:
        turn = connection.execute(sa.select(sa.func.coalesce(sa.func.max(_turns.c.turn), 0))).scalar_one()
        for place, tenant_id in enumerate(tenants, turn + 1):
            taken = self._database.insert(_turns).values(tenant_id=tenant_id, turn=place)
            connection.execute(taken.on_conflict_do_update(index_elements=["tenant_id"], set_={"turn": place}))


def _numbered(connection: sa.Connection, session_id: str, number: int) -> GradientOperation | None:
    query = sa.select(_table).where(_table.c.session_id == session_id, _table.c.number == number)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else _operation(row)


def _count(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(_table).where(_table.c.status.in_(UNENDED), *where)
    return connection.execute(query).scalar_one()


def _version(connection: sa.Connection, auxiliary_id: str) -> int:
    return connection.execute(sa.select(_auxiliaries.c.version).where(_auxiliaries.c.id == auxiliary_id)).scalar_one()


def _require_awaited(
    connection: sa.Connection, session: sa.RowMapping, number: int, most_queued: int, version: int | None
) -> None:
    if session["status"] != "open":
        raise SessionClosedError("the session is closed")
    if number != session["next_number"]:
        raise NumberTooHighError(session["next_number"])
    if _count(connection, _table.c.session_id == session["id"]) >= most_queued:
        raise TooManyQueuedError(f"{most_queued} operations of the session are not over")
    if version is not None:
        _require_version(connection, session["auxiliary_id"], version)


def _require_version(connection: sa.Connection, auxiliary_id: str, version: int) -> None:
    present = _version(connection, auxiliary_id)
    coming = _count(connection, _table.c.auxiliary_id == auxiliary_id, _table.c.kind == "load")
    if not present <= version <= present + coming:
        raise VersionError(present)


def _move(connection: sa.Connection, auxiliary_id: str, expected: int, version: int, key: str | None) -> None:
    there = [_auxiliaries.c.id == auxiliary_id, _auxiliaries.c.version == expected]
    moved = sa.update(_auxiliaries).where(*there).values(version=version, key=key).returning(_auxiliaries.c.id)
    if connection.execute(moved).one_or_none() is None:
        raise _TakenOverError


def _used(now: int) -> dict[str, Any]:
    """What a session's row says after it was used: it lasts as long from now on as it did before."""
    return {"used_at": now, "expires_at": now + _sessions.c.expires_at - _sessions.c.used_at}
