"""Customers' accounts and their limits."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ot_ray.config import parse
from ot_ray.errors import AlreadyExistsError, ConfigError, NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database, page
from serve.catalogue.records import Page, Tenant, TenantLimits, new_id

_table = schema.tenants
# As `ot_ray.artifacts` has it for the parts of a plug-in's id; said again, because that room opens models.
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME = re.compile(NAME_PATTERN)


def tenant_of(row: Mapping[Any, Any]) -> Tenant:
    """A row of the table as a record."""
    limits = TenantLimits.model_validate(row["limits"])
    return Tenant(row["id"], row["name"], row["created_at"], row["disabled_at"], limits)


class Tenants:
    """The table of tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, name: str, limits: TenantLimits | None = None, *, tenant_id: str | None = None, audit: Note | None = None
    ) -> Tenant:
        """Add a tenant; one that is there under the same id and name is returned.

        Raises:
            ConfigError: the name is no name.
            AlreadyExistsError: another tenant has it.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"tenant name {name[:80]!r} is no name; use {NAME_PATTERN}")
        row = {
            "id": tenant_id or new_id("ten_"),
            "name": name,
            "created_at": self._database.now(),
            "limits": (limits or TenantLimits()).model_dump(),
        }
        with self._database.write() as connection:
            added = self._database.insert(_table).values(row).on_conflict_do_nothing().returning(_table.c.id)
            if connection.execute(added).one_or_none() is not None:
                note(connection, row["created_at"], audit, row["id"])
            named = sa.select(_table).where(_table.c.name == name)
            found = connection.execute(named).mappings().one_or_none()
            if found is None or found["id"] != row["id"]:
                raise AlreadyExistsError(f"tenant {name} is already there; choose another name")
            return tenant_of(found)

    def get(self, tenant_id: str) -> Tenant:
        """The tenant of an id. Raises NotFoundError."""
        return self._one(_table.c.id == tenant_id, tenant_id)

    def named(self, name: str) -> Tenant:
        """The tenant of a name. Raises NotFoundError."""
        return self._one(_table.c.name == name, name)

    def list(self) -> builtins.list[Tenant]:
        """Every tenant, the first made first."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(_table).order_by(_table.c.position)).mappings()
            return [tenant_of(row) for row in rows]

    def page(self, *, after: str | None = None, limit: int = 20) -> Page[Tenant]:
        """Tenants, the newest first. Raises NotFoundError for an unknown `after`."""
        with self._database.read() as connection:
            return page(connection, _table, [], tenant_of, after=after, limit=limit)

    def change(
        self, tenant_id: str, *, limits: Mapping[str, int], disabled: bool | None, audit: Note | None = None
    ) -> Tenant:
        """Give a tenant other limits, and refuse or take its keys; both hold from the next request on.

        Args:
            limits: those to change; others stay.
            disabled: None leaves it as it is.

        Raises:
            ConfigError: a limit is unknown or out of range.
            NotFoundError: there is no such tenant.
        """
        mine = _table.c.id == tenant_id
        with self._database.write() as connection:
            row = (
                connection.execute(sa.select(_table).where(mine).with_for_update(key_share=True))
                .mappings()
                .one_or_none()
            )
            if row is None:
                raise _unknown(tenant_id)
            now = self._database.now()
            values: dict[str, Any] = {"limits": parse(TenantLimits, {**row["limits"], **limits}, "limits").model_dump()}
            if disabled is not None:
                values["disabled_at"] = (row["disabled_at"] or now) if disabled else None
            note(connection, now, audit, tenant_id)
            changed = sa.update(_table).where(mine).values(**values).returning(_table)
            return tenant_of(connection.execute(changed).mappings().one())

    def change_limits(self, tenant_id: str, limits: Mapping[str, int], audit: Note | None = None) -> Tenant:
        """Give a tenant other limits, as `change` does."""
        return self.change(tenant_id, limits=limits, disabled=None, audit=audit)

    def disable(self, tenant_id: str, audit: Note | None = None) -> Tenant:
        """Refuse every key of a tenant from the next request on. Raises NotFoundError."""
        return self.change(tenant_id, limits={}, disabled=True, audit=audit)

    def enable(self, tenant_id: str, audit: Note | None = None) -> Tenant:
        """Take a tenant's keys again. Raises NotFoundError."""
        return self.change(tenant_id, limits={}, disabled=False, audit=audit)

    def _one(self, where: sa.ColumnElement[bool], asked: str) -> Tenant:
        with self._database.read() as connection:
            row = connection.execute(sa.select(_table).where(where)).mappings().one_or_none()
        if row is None:
            raise _unknown(asked)
        return tenant_of(row)


def _unknown(asked: str) -> NotFoundError:
    return NotFoundError(f"no tenant {asked[:80]!r}; `tenant list` shows those that are there")
