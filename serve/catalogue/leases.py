"""Leases: rows that say who leads until when, by the database's clock, which is the same for all."""

from __future__ import annotations

import sqlalchemy as sa

from serve.catalogue import schema
from serve.catalogue.database import Database

_table = schema.leases


class Leases:
    """The table of leases."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, name: str, holder: str, seconds: int) -> bool:
        """Take a lease, or hold it for longer; False if another holds it."""
        now = self._database.shared_now()
        row = {"name": name, "holder": holder, "expires_at": now + seconds}
        taken = self._database.insert(_table).values(row)
        taken = taken.on_conflict_do_update(
            index_elements=["name"],
            set_={"holder": holder, "expires_at": now + seconds},
            where=sa.or_(_table.c.holder == holder, _table.c.expires_at <= now),
        )
        with self._database.write() as connection:
            return connection.execute(taken.returning(_table.c.name)).one_or_none() is not None

    def release(self, name: str, holder: str) -> None:
        """Give a lease up; nothing happens if another holds it."""
        with self._database.write() as connection:
            connection.execute(sa.delete(_table).where(_table.c.name == name, _table.c.holder == holder))
