"""Adapters that customers tuned at home, from the first byte of the upload to the verdict."""

from __future__ import annotations

import builtins
from collections.abc import Collection
from functools import partial
from typing import Any

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database, page
from serve.catalogue.records import Adapter, AdapterState, Page, new_id, record

_table = schema.adapters
_adapter = partial(record, Adapter)
_VERDICTS: frozenset[AdapterState] = frozenset({"accepted", "rejected"})


class Adapters:
    """The table of offsite uploads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: str,
        *,
        bundle: dict[str, Any],
        suffix: str,
        files: builtins.list[dict[str, Any]],
        bytes: int,
        adapter_id: str | None = None,
        most_open: int | None = None,
        audit: Note | None = None,
    ) -> Adapter | None:
        """Add an upload in `receiving`; one that is there under the same id is returned.

        Args:
            most_open: uploads of the tenant without a verdict, this one included; None for no limit.

        Returns:
            The upload, or None if the tenant has `most_open` of them already.
        """
        now = self._database.now()
        row = {
            "id": adapter_id or new_id("adp_"),
            "tenant_id": tenant_id,
            "bundle": bundle,
            "suffix": suffix,
            "state": "receiving",
            "files": files,
            "reasons": [],
            "bytes": bytes,
            "created_at": now,
            "touched_at": now,
        }
        with self._database.write() as connection:
            tenants = schema.tenants
            connection.execute(sa.select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update(key_share=True))
            mine = sa.select(_table).where(_table.c.id == row["id"], _table.c.tenant_id == tenant_id)
            there = connection.execute(mine).mappings().one_or_none()
            if there is not None:
                return _adapter(there)
            if most_open is not None:
                count = sa.select(sa.func.count()).select_from(_table)
                undecided = count.where(_table.c.tenant_id == tenant_id, _table.c.state.not_in(_VERDICTS))
                if connection.execute(undecided).scalar_one() >= most_open:
                    return None
            note(connection, now, audit, row["id"])
            return _adapter(connection.execute(sa.insert(_table).values(row).returning(_table)).mappings().one())

    def get(self, tenant_id: str, adapter_id: str) -> Adapter:
        """A tenant's upload. Raises NotFoundError."""
        query = sa.select(_table).where(_table.c.id == adapter_id, _table.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise _unknown(adapter_id)
        return _adapter(row)

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 20) -> Page[Adapter]:
        """A tenant's uploads, the newest first. Raises NotFoundError for an unknown `after`."""
        with self._database.read() as connection:
            return page(connection, _table, [_table.c.tenant_id == tenant_id], _adapter, after=after, limit=limit)

    def in_state(self, *states: AdapterState) -> builtins.list[Adapter]:
        """Uploads of all tenants in any of these states, the first made first."""
        query = sa.select(_table).where(_table.c.state.in_(states)).order_by(_table.c.position)
        with self._database.read() as connection:
            return [_adapter(row) for row in connection.execute(query).mappings()]

    def move(
        self,
        adapter_id: str,
        expected: Collection[AdapterState],
        to: AdapterState,
        *,
        audit: Note | None = None,
        **fields: Any,
    ) -> Adapter | None:
        """Change an upload's state if it is one of the expected; a verdict is never changed. None if it was another."""
        now = self._database.now()
        values = {"state": to, "touched_at": now, **({"finished_at": now} if to in _VERDICTS else {}), **fields}
        change = sa.update(_table).where(_table.c.id == adapter_id, _table.c.state.in_(set(expected) - _VERDICTS))
        with self._database.write() as connection:
            row = connection.execute(change.values(**values).returning(_table)).mappings().one_or_none()
            if row is not None:
                note(connection, now, audit, adapter_id)
        return None if row is None else _adapter(row)

    def touch(self, adapter_id: str) -> None:
        """Note that an upload goes on."""
        with self._database.write() as connection:
            connection.execute(
                sa.update(_table).where(_table.c.id == adapter_id).values(touched_at=self._database.now())
            )

    def abandoned(self, before: int) -> builtins.list[Adapter]:
        """Uploads of all tenants that are still received, but of which nothing came since `before`."""
        query = sa.select(_table).where(_table.c.state == "receiving", _table.c.touched_at < before)
        with self._database.read() as connection:
            return [_adapter(row) for row in connection.execute(query).mappings()]

    def delete(self, adapter_id: str, expected: Collection[AdapterState], audit: Note | None = None) -> bool:
        """Take out an upload that is in one of the expected states; False if it is in another."""
        gone = sa.delete(_table).where(_table.c.id == adapter_id, _table.c.state.in_(expected))
        with self._database.write() as connection:
            done = connection.execute(gone.returning(_table.c.id)).one_or_none() is not None
            if done:
                note(connection, self._database.now(), audit, adapter_id)
            return done


def _unknown(adapter_id: str) -> NotFoundError:
    return NotFoundError(f"no adapter {adapter_id[:80]!r}")
