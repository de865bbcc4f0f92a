"""Sessions of gradient learning, and the auxiliaries that they train.

What is done in a session is in gradient_operations.py."""

from __future__ import annotations

import builtins
from functools import partial
from typing import Any

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database, page
from serve.catalogue.gradient_claims import UNENDED
from serve.catalogue.gradient_refusals import GroupMismatchError
from serve.catalogue.records import GradientAuxiliary, GradientSession, Page, new_id, record

_table = schema.gradient_sessions
_auxiliaries = schema.gradient_auxiliaries
_operations = schema.gradient_operations
_auxiliary = partial(record, GradientAuxiliary)
_CLOSED = {
    "type": "invalid_request_error",
    "message": "The session was closed before this operation was carried out.",
    "param": None,
    "code": "session_closed",
}
# What all sessions of a group have in common, by mode.
_ALIKE = {"collaboration": ("mode",), "joint": ("mode", "sites", "auxiliary", "fit", "interval", "fitting")}


class GradientSessions:
    """The tables of sessions and of auxiliaries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: str,
        *,
        model: str,
        settings: dict[str, Any],
        idle_s: int,
        session_id: str | None = None,
        most_open: int | None = None,
        audit: Note | None = None,
    ) -> GradientSession | None:
        """Open a session; one that is there under the same id is returned.

        A session of mode `joint` gets the auxiliary of its group's open sessions, any other a fresh one of its own.

        Args:
            settings: as `GradientSession` has them.
            idle_s: seconds after the last operation until it is closed.
            most_open: open sessions that the tenant may have, this one included; None for no limit.

        Returns:
            The session, or None if the tenant has `most_open` already; nothing is added then.

        Raises:
            GroupMismatchError: the group's open sessions are of another mode or model, or, where they share an
                auxiliary, have another one.
        """
        now, wanted = self._database.now(), session_id or new_id("cola-")
        with self._database.write() as connection:
            # Sessions that one tenant opens at the same time are counted, and find their group, one after the other.
            tenants = schema.tenants
            connection.execute(sa.select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update(key_share=True))
            there = _one(connection, _table.c.id == wanted, _table.c.tenant_id == tenant_id)
            if there is not None:
                return there
            if most_open is not None and _count_open(connection, tenant_id) >= most_open:
                return None
            group = settings["group"]
            others = [] if group is None else _open_in(connection, tenant_id, group)
            _require_alike(others, model, settings)
            joint = settings["mode"] == "joint" and others
            row = {
                "id": wanted,
                "tenant_id": tenant_id,
                "auxiliary_id": others[0].auxiliary_id if joint else _fresh(connection, tenant_id, settings, now),
                "status": "open",
                "model": model,
                "group": group,
                "settings": settings,
                "created_at": now,
                "used_at": now,
                "expires_at": now + idle_s,
            }
            connection.execute(sa.insert(_table).values(row))
            note(connection, now, audit, wanted)
            made = _one(connection, _table.c.id == wanted)
            assert made is not None
            return made

    def find(self, session_id: str, tenant_id: str | None = None) -> GradientSession:
        """A session, of this tenant if one is given. Raises NotFoundError."""
        where = [_table.c.id == session_id]
        if tenant_id is not None:
            where.append(_table.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            found = _one(connection, *where)
        if found is None:
            raise NotFoundError(f"no session {session_id[:80]!r}")
        return found

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 20) -> Page[GradientSession]:
        """A tenant's sessions, the newest first. Raises NotFoundError for an unknown `after`."""
        with self._database.read() as connection:
            where = [_table.c.tenant_id == tenant_id]
            found = page(connection, _table, where, lambda row: row["id"], after=after, limit=limit)
            rows = {session.id: session for session in _all(connection, _table.c.id.in_(found.items))}
        return Page([rows[key] for key in found.items], found.has_more)

    def auxiliary(self, auxiliary_id: str) -> GradientAuxiliary:
        """An auxiliary as it is now. Raises NotFoundError."""
        with self._database.read() as connection:
            query = sa.select(_auxiliaries).where(_auxiliaries.c.id == auxiliary_id)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFoundError(f"no auxiliary {auxiliary_id[:80]!r}")
        return _auxiliary(row)

    def group(self, tenant_id: str, group: str) -> builtins.list[GradientSession]:
        """The open sessions of a tenant's group, the first opened first."""
        with self._database.read() as connection:
            return _open_in(connection, tenant_id, group)

    def sharing(self, auxiliary_id: str) -> builtins.list[GradientSession]:
        """The open sessions that train an auxiliary."""
        with self._database.read() as connection:
            return _all(connection, _table.c.auxiliary_id == auxiliary_id, _table.c.status == "open")

    def close(self, session_id: str, audit: Note | None = None) -> GradientSession:
        """Take no more operations; those that are not over fail. One that is closed stays as it is.

        Raises:
            NotFoundError: there is no such session.
        """
        with self._database.write() as connection:
            now = self._database.now()
            if _close(connection, session_id, now):
                note(connection, now, audit, session_id)
            found = _one(connection, _table.c.id == session_id)
        if found is None:
            raise NotFoundError(f"no session {session_id[:80]!r}")
        return found

    def expire_idle(self, limit: int = 100) -> builtins.list[GradientSession]:
        """Close sessions of whichever tenant whose time is over, and give them."""
        now = self._database.now()
        busy = sa.select(_operations.c.id).where(
            _operations.c.session_id == _table.c.id, _operations.c.status.in_(UNENDED)
        )
        idle = [_table.c.status == "open", _table.c.expires_at <= now, ~busy.exists()]
        with self._database.read() as connection:
            query = sa.select(_table.c.id).where(*idle).order_by(_table.c.expires_at).limit(limit)
            ids = connection.execute(query).scalars().all()
        closed = []
        for session_id in ids:
            with self._database.write() as connection:
                if _close(connection, session_id, now, *idle):
                    note(connection, now, Note("cola.expire"), session_id)
                    closed += _all(connection, _table.c.id == session_id)
        return closed

    def uncleaned(self, limit: int = 100, closed_for_s: int = 0) -> builtins.list[GradientSession]:
        """Sessions that may have left something in the store, closed for at least so long, the first closed first."""
        before = self._database.now() - closed_for_s
        left = [_table.c.status == "closed", _table.c.cleaned_at.is_(None), _table.c.closed_at <= before]
        query = sa.select(_table.c.id).where(*left).order_by(_table.c.closed_at, _table.c.position).limit(limit)
        with self._database.read() as connection:
            return _all(connection, _table.c.id.in_(connection.execute(query).scalars().all()))

    def cleaned(self, session_id: str) -> None:
        """Note that nothing of a closed session is left in the store, and forget its operations."""
        mine = [_table.c.id == session_id, _table.c.status == "closed"]
        with self._database.write() as connection:
            done = sa.update(_table).where(*mine).values(cleaned_at=self._database.now())
            if connection.execute(done.returning(_table.c.id)).one_or_none() is not None:
                connection.execute(sa.delete(_operations).where(_operations.c.session_id == session_id))


def _joined() -> sa.Select[Any]:
    return sa.select(_table, _auxiliaries.c.version).join(_auxiliaries, _auxiliaries.c.id == _table.c.auxiliary_id)


def _all(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> list[GradientSession]:
    rows = connection.execute(_joined().where(*where).order_by(_table.c.position)).mappings()
    return [record(GradientSession, row) for row in rows]


def _one(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> GradientSession | None:
    return next(iter(_all(connection, *where)), None)


def _open_in(connection: sa.Connection, tenant_id: str, group: str) -> list[GradientSession]:
    return _all(connection, _table.c.tenant_id == tenant_id, _table.c.group == group, _table.c.status == "open")


def _count_open(connection: sa.Connection, tenant_id: str) -> int:
    query = sa.select(sa.func.count()).select_from(_table)
    return connection.execute(query.where(_table.c.tenant_id == tenant_id, _table.c.status == "open")).scalar_one()


def _fresh(connection: sa.Connection, tenant_id: str, settings: dict[str, Any], now: int) -> str:
    auxiliary_id, shared = new_id("aux_"), settings["mode"] == "joint"
    group = settings["group"] if shared else None
    row = {"id": auxiliary_id, "tenant_id": tenant_id, "group": group, "version": 0, "created_at": now}
    connection.execute(sa.insert(_auxiliaries).values(row))
    return auxiliary_id


def _require_alike(others: list[GradientSession], model: str, settings: dict[str, Any]) -> None:
    for other in others:
        if other.model != model:
            raise GroupMismatchError("model")
        for field in _ALIKE[other.settings["mode"]]:
            if other.settings[field] != settings[field]:
                raise GroupMismatchError(field)


def _close(connection: sa.Connection, session_id: str, now: int, *where: sa.ColumnElement[bool]) -> bool:
    mine = _table.c.id == session_id
    # Nobody joins a group by this session while it is closed.
    owner = sa.select(_table.c.tenant_id).where(mine).scalar_subquery()
    tenants = schema.tenants
    connection.execute(sa.select(tenants.c.id).where(tenants.c.id == owner).with_for_update(key_share=True))
    closed = sa.update(_table).where(mine, _table.c.status == "open", *where)
    closed = closed.values(status="closed", closed_at=now).returning(_table.c.id)
    if connection.execute(closed).one_or_none() is None:
        return False
    left = sa.update(_operations).where(_operations.c.session_id == session_id, _operations.c.status.in_(UNENDED))
    connection.execute(left.values(status="failed", error=_CLOSED, request={}, finished_at=now))
    return True
