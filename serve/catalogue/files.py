"""Rows of uploaded files and of jobs' results; their bytes are in the store."""

from __future__ import annotations

import builtins
from functools import partial

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database, page
from serve.catalogue.records import File, Page, new_id, record

_table = schema.files
_file = partial(record, File)


class Files:
    """The table of files; a deleted or expired one is in no answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: str,
        *,
        filename: str,
        bytes: int,
        sha256: str,
        purpose: str,
        status: str = "processed",
        expires_at: int | None = None,
        file_id: str | None = None,
        most_bytes: int | None = None,
        lasts_s: int | None = None,
        reserved_s: int | None = None,
    ) -> File | None:
        """Add a file whose bytes are in the store already; one that is there under the same id is returned.

        Args:
            file_id: the id to give; None makes one.
            most_bytes: what the tenant may keep in all; None for no limit.
            lasts_s: seconds after its creation at which it expires, in place of `expires_at`.
            reserved_s: the bytes are not in the store yet: the file counts, but is in no answer until `confirm`,
                and is swept like a deleted one after so many seconds.

        Returns:
            The file, or None if it does not fit into `most_bytes`; nothing is added then.
        """
        now = self._database.now()
        row = {
            "id": file_id or new_id("file-"),
            "tenant_id": tenant_id,
            "filename": filename,
            "bytes": bytes,
            "sha256": sha256,
            "purpose": purpose,
            "status": status,
            "created_at": now,
            "expires_at": expires_at if lasts_s is None else now + lasts_s,
            "deleted_at": None if reserved_s is None else now + reserved_s,
        }
        with self._database.write() as connection:
            # Uploads of one tenant at the same time are counted one after the other.
            tenant = (
                sa.select(schema.tenants.c.id).where(schema.tenants.c.id == tenant_id).with_for_update(key_share=True)
            )
            connection.execute(tenant)
            mine = sa.select(_table).where(_table.c.id == row["id"], _table.c.tenant_id == tenant_id)
            there = connection.execute(mine).mappings().one_or_none()
            if there is not None:
                return _file(there)
            if most_bytes is not None and self._kept(connection, tenant_id) + bytes > most_bytes:
                return None
            return _file(connection.execute(sa.insert(_table).values(row).returning(_table)).mappings().one())

    def get(self, tenant_id: str, file_id: str) -> File:
        """A tenant's file. Raises NotFoundError."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(_table).where(*self._visible(tenant_id), _table.c.id == file_id))
            found = row.mappings().one_or_none()
        if found is None:
            raise NotFoundError(f"no file {file_id[:80]!r}")
        return _file(found)

    def list(
        self,
        tenant_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
        purpose: str | None = None,
    ) -> Page[File]:
        """A tenant's files. Raises NotFoundError for an unknown `after`."""
        where = self._visible(tenant_id)
        if purpose is not None:
            where.append(_table.c.purpose == purpose)
        with self._database.read() as connection:
            return page(connection, _table, where, _file, after=after, limit=limit, order=order)

    def delete(self, tenant_id: str, file_id: str, audit: Note | None = None) -> File:
        """Take a file out of every answer; removing its bytes is the caller's. Raises NotFoundError."""
        now = self._database.now()
        change = sa.update(_table).where(*self._visible(tenant_id), _table.c.id == file_id)
        with self._database.write() as connection:
            row = connection.execute(change.values(deleted_at=now).returning(_table))
            found = row.mappings().one_or_none()
            if found is None:
                raise NotFoundError(f"no file {file_id[:80]!r}")
            note(connection, now, audit, file_id)
        return _file(found)

    def confirm(self, file_id: str, audit: Note | None = None) -> bool:
        """Show a reserved file, whose bytes are in the store now; False if it was deleted, or its time was over."""
        now = self._database.now()
        with self._database.write() as connection:
            reserved = sa.update(_table).where(_table.c.id == file_id, _table.c.deleted_at > now)
            if connection.execute(reserved.values(deleted_at=None)).rowcount == 1:
                note(connection, now, audit, file_id)
                return True
            shown = sa.select(_table.c.id).where(_table.c.id == file_id, _table.c.deleted_at.is_(None))
            return connection.execute(shown).one_or_none() is not None

    def release(self, file_id: str) -> bool:
        """Give a reserved file up; False if there is none, or it was confirmed."""
        now = self._database.now()
        with self._database.write() as connection:
            change = sa.update(_table).where(_table.c.id == file_id, _table.c.deleted_at > now)
            return connection.execute(change.values(deleted_at=now)).rowcount == 1

    def doomed(self, limit: int = 100) -> builtins.list[File]:
        """Files of all tenants that are deleted, or were reserved too long ago, and whose bytes may be left."""
        query = sa.select(_table).where(_table.c.deleted_at <= self._database.now()).limit(limit)
        with self._database.read() as connection:
            return [_file(row) for row in connection.execute(query).mappings()]

    def is_doomed(self, file_id: str) -> bool:
        """Whether a file is still one of `doomed`."""
        query = sa.select(_table.c.id).where(_table.c.id == file_id, _table.c.deleted_at <= self._database.now())
        with self._database.read() as connection:
            return connection.execute(query).one_or_none() is not None

    def erase(self, file_id: str) -> None:
        """Drop the row of a deleted file, once its bytes are gone."""
        with self._database.write() as connection:
            doomed = _table.c.deleted_at <= self._database.now()
            connection.execute(sa.delete(_table).where(_table.c.id == file_id, doomed))

    def set_status(self, file_id: str, status: str, details: str | None = None) -> None:
        """Say what became of a file."""
        with self._database.write() as connection:
            change = sa.update(_table).where(_table.c.id == file_id)
            connection.execute(change.values(status=status, status_details=details))

    def kept_bytes(self, tenant_id: str) -> int:
        """Bytes of all files that a tenant keeps."""
        with self._database.read() as connection:
            return self._kept(connection, tenant_id)

    def expired(self, limit: int = 100) -> builtins.list[File]:
        """Files whose time is over and that are not deleted yet, of all tenants."""
        now = self._database.now()
        query = sa.select(_table).where(_table.c.expires_at <= now, _table.c.deleted_at.is_(None)).limit(limit)
        with self._database.read() as connection:
            return [_file(row) for row in connection.execute(query).mappings()]

    def forget(self, file_id: str) -> None:
        """Mark a file of any tenant as deleted; nothing happens to one that is already."""
        change = sa.update(_table).where(_table.c.id == file_id, _table.c.deleted_at.is_(None))
        with self._database.write() as connection:
            connection.execute(change.values(deleted_at=self._database.now()))

    def _kept(self, connection: sa.Connection, tenant_id: str) -> int:
        mine = (_table.c.tenant_id == tenant_id, self._there(), self._lasting())
        total = sa.select(sa.func.coalesce(sa.func.sum(_table.c.bytes), 0)).where(*mine)
        return int(connection.execute(total).scalar_one())

    def _visible(self, tenant_id: str) -> builtins.list[sa.ColumnElement[bool]]:
        return [_table.c.tenant_id == tenant_id, _table.c.deleted_at.is_(None), self._lasting()]

    def _lasting(self) -> sa.ColumnElement[bool]:
        return sa.or_(_table.c.expires_at.is_(None), _table.c.expires_at > self._database.now())

    def _there(self) -> sa.ColumnElement[bool]:
        """Neither deleted nor reserved for too long."""
        return sa.or_(_table.c.deleted_at.is_(None), _table.c.deleted_at > self._database.now())
