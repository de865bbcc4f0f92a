"""The audit log: who did what to what. Lines are added and read; nothing here changes or removes one.

What a transaction of the database does is noted within it; what is done elsewhere is noted as begun before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.database import Database
from serve.catalogue.records import AuditLine, Page, record

_table = schema.audit
_line = partial(record, AuditLine)
_BATCH = 500


@dataclass(frozen=True)
class Note:
    """Who does what: a line of the log in the making, for the transaction that does it. No secret belongs in it."""

    action: str
    """A noun and a verb, as in `key.revoke`."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What else is worth knowing."""
    tenant_id: str | None = None
    """Whose key asked; None for a command of the operator's."""
    key_id: str | None = None
    request_id: str | None = None


def note(
    connection: sa.Connection, now: int, audit: Note | None, target: str, outcome: str = "ok", **found: Any
) -> None:
    """Add a line to the log in the transaction whose doing it tells; nothing without a note.

    Args:
        target: the id of what it is done to.
        found: details that the transaction itself has found out.
    """
    if audit is not None:
        row = {**asdict(audit), "detail": {**audit.detail, **found}, "at": now, "target": target, "outcome": outcome}
        connection.execute(sa.insert(_table).values(row))


class Audit:
    """The table of the audit log, which the database itself keeps from being changed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        action: str,
        target: str,
        *,
        tenant_id: str | None = None,
        key_id: str | None = None,
        outcome: str = "ok",
        request_id: str | None = None,
        **detail: Any,
    ) -> None:
        """Add a line about what no transaction of the database does; arguments as those of `Note` and `note`.

        Args:
            outcome: `ok`, `denied`, or `begun` for what is about to be done outside of the database.
        """
        self.write(Note(action, detail, tenant_id, key_id, request_id), target, outcome)

    def write(self, line: Note, target: str, outcome: str = "ok") -> None:
        """Add a line in a transaction of its own; arguments as those of `note`."""
        with self._database.write() as connection:
            note(connection, self._database.now(), line, target, outcome)

    def list(
        self,
        *,
        tenant_id: str | None = None,
        action: str | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page[AuditLine]:
        """Lines, the newest first.

        Args:
            tenant_id: only those of this tenant's keys.
            action: only those of this action.
            after: the `seq` of the last line of the page before.

        Raises:
            NotFoundError: there is no line `after`.
        """
        query = sa.select(_table).where(*_wanted(tenant_id, action)).order_by(_table.c.seq.desc()).limit(limit + 1)
        with self._database.read() as connection:
            if after is not None:
                if connection.execute(sa.select(_table.c.seq).where(_table.c.seq == after)).one_or_none() is None:
                    raise NotFoundError(f"after is {after}, which names no line; pass the last seq you got")
                query = query.where(_table.c.seq < after)
            rows = connection.execute(query).mappings().all()
        return Page([_line(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def walk(self, *, tenant_id: str | None = None, action: str | None = None) -> Iterator[AuditLine]:
        """Every line that was there when the walk began, the oldest first, without holding them all in memory."""
        with self._database.read() as connection:
            last = connection.execute(sa.select(sa.func.max(_table.c.seq))).scalar_one() or 0
        seen = 0
        while True:
            query = sa.select(_table).where(_table.c.seq > seen, _table.c.seq <= last, *_wanted(tenant_id, action))
            with self._database.read() as connection:
                rows = connection.execute(query.order_by(_table.c.seq).limit(_BATCH)).mappings().all()
            yield from (_line(row) for row in rows)
            if len(rows) < _BATCH:
                return
            seen = rows[-1]["seq"]

    def json_lines(self, *, tenant_id: str | None = None, action: str | None = None) -> Iterator[str]:
        """The lines of a walk as text, a JSON object each."""
        for line in self.walk(tenant_id=tenant_id, action=action):
            yield f"{json.dumps(asdict(line))}\n"


def _wanted(tenant_id: str | None, action: str | None) -> list[sa.ColumnElement[bool]]:
    where = [] if tenant_id is None else [_table.c.tenant_id == tenant_id]
    return where if action is None else [*where, _table.c.action == action]
