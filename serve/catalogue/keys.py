"""API keys: random secrets of which only the hash is stored, with scopes, an end and a way to take them back.

Who may ask for what over HTTP is decided in routes/identity.py."""

from __future__ import annotations

import builtins
import hashlib
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from ot_ray.errors import ConfigError, NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database, page
from serve.catalogue.records import SCOPES, ApiKey, Page, Tenant, new_id, record
from serve.catalogue.tenants import tenant_of

_table = schema.api_keys
_NAME_LENGTH = 64


@dataclass(frozen=True)
class Authenticated:
    """Who a secret belongs to; whether it may be used now is told by `refusal`."""

    key: ApiKey
    tenant: Tenant
    refusal: str | None
    """`revoked`, `expired` or `disabled`; None for a key that is good."""


class NewKey(NamedTuple):
    """A key that was just made, with the secret that nobody can ask for again."""

    key: ApiKey
    secret: str


def key_of(row: Mapping[Any, Any]) -> ApiKey:
    """A row of the table as a record."""
    return record(ApiKey, {**row, "scopes": frozenset(row["scopes"])})


class Keys:
    """The table of keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: str,
        scopes: Collection[str],
        *,
        name: str = "",
        expires_at: int | None = None,
        key_id: str | None = None,
        audit: Note | None = None,
    ) -> NewKey:
        """Add a key; its secret is returned here and never again. One that is there under the same id gets a fresh
        secret, because nobody was told the first.

        Args:
            expires_at: seconds since 1970 from which on it is refused; None for no end.
            key_id: the id to give; None makes one.

        Raises:
            ConfigError: a scope is unknown, there is none, or the end has passed.
            NotFoundError: there is no such tenant.
        """
        now = self._database.now()
        _check(scopes, name, expires_at, now)
        life = None if expires_at is None else expires_at - now
        with self._database.write() as connection:
            known = sa.select(schema.tenants.c.id).where(schema.tenants.c.id == tenant_id)
            if connection.execute(known).one_or_none() is None:
                raise NotFoundError(f"no tenant {tenant_id[:80]!r}; `tenant list` shows those that are there")
            there = self._again(connection, tenant_id, key_id)
            made = there or self._add(connection, tenant_id, scopes, name, life, key_id)
            note(connection, now, audit, made.key.id)
            return made

    def get(self, key_id: str) -> ApiKey:
        """The key of an id. Raises NotFoundError."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(_table).where(_table.c.id == key_id)).mappings().one_or_none()
        if row is None:
            raise _unknown(key_id)
        return key_of(row)

    def list(self, tenant_id: str | None = None, *, after: str | None = None, limit: int = 20) -> Page[ApiKey]:
        """Keys of one tenant or of all, the newest first. Raises NotFoundError for an unknown `after`."""
        where = [] if tenant_id is None else [_table.c.tenant_id == tenant_id]
        with self._database.read() as connection:
            return page(connection, _table, where, key_of, after=after, limit=limit)

    def authenticate(self, secret: str) -> Authenticated | None:
        """Whose secret this is, by one indexed query; None if it is nobody's."""
        tenants = schema.tenants
        query = (
            sa.select(_table, *(column.label(f"owner_{column.name}") for column in tenants.c))
            .join(tenants, tenants.c.id == _table.c.tenant_id)
            .where(_table.c.hash == _hash(secret))
        )
        with self._database.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        key = key_of(row)
        tenant = tenant_of({column.name: row[f"owner_{column.name}"] for column in tenants.c})
        return Authenticated(key, tenant, _refusal(key, tenant, self._database.now()))

    def rotate(
        self, key_id: str, *, overlap_s: int = 24 * 3600, successor_id: str | None = None, audit: Note | None = None
    ) -> NewKey:
        """A new key with the same tenant, name, scopes and length of life; the old one ends after the overlap.

        Args:
            successor_id: the new key's id; None makes one. A key that is there under it gets a fresh secret, and the
                old one's end stays.

        Raises:
            NotFoundError: there is no such key.
            ConfigError: it was revoked or has expired, so that there is nothing to go on from.
        """
        now = self._database.now()
        with self._database.write() as connection:
            locked = sa.select(_table).where(_table.c.id == key_id).with_for_update(key_share=True)
            row = connection.execute(locked).mappings().one_or_none()
            if row is None:
                raise _unknown(key_id)
            old = key_of(row)
            note(connection, now, audit, key_id)
            there = self._again(connection, old.tenant_id, successor_id)
            if there is not None:
                return there
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
                raise ConfigError(f"key {key_id} was revoked or has expired; create a new one")
            ends = now + overlap_s if old.expires_at is None else min(now + overlap_s, old.expires_at)
            connection.execute(sa.update(_table).where(_table.c.id == key_id).values(expires_at=ends))
            # Not from `expires_at`, which an earlier rotation has brought forward.
            return self._add(connection, old.tenant_id, old.scopes, old.name, row["lifetime_s"], successor_id)

    def revoke(self, key_id: str, audit: Note | None = None) -> ApiKey:
        """Refuse a key from the next request on, for good. Raises NotFoundError."""
        now = self._database.now()
        when = sa.func.coalesce(_table.c.revoked_at, now)
        with self._database.write() as connection:
            changed = sa.update(_table).where(_table.c.id == key_id).values(revoked_at=when).returning(_table)
            row = connection.execute(changed).mappings().one_or_none()
            if row is None:
                raise _unknown(key_id)
            note(connection, now, audit, key_id, tenant=row["tenant_id"])
        return key_of(row)

    def _again(self, connection: sa.Connection, tenant_id: str, key_id: str | None) -> NewKey | None:
        """The key that a request made before its answer was lost, with a fresh secret; None if there is none."""
        if key_id is None:
            return None
        secret = _new_secret()
        same = sa.update(_table).where(_table.c.id == key_id, _table.c.tenant_id == tenant_id)
        fresh = same.values(hash=_hash(secret), hint=secret[-4:]).returning(_table)
        row = connection.execute(fresh).mappings().one_or_none()
        return None if row is None else NewKey(key_of(row), secret)

    def _add(
        self,
        connection: sa.Connection,
        tenant_id: str,
        scopes: Collection[str],
        name: str,
        lifetime_s: int | None,
        key_id: str | None,
    ) -> NewKey:
        secret, now = _new_secret(), self._database.now()
        ordered: builtins.list[str] = [scope for scope in SCOPES if scope in scopes]
        row = {
            "id": key_id or new_id("key_"),
            "tenant_id": tenant_id,
            "name": name,
            "hint": secret[-4:],
            "scopes": ordered,
            "created_at": now,
            "expires_at": None if lifetime_s is None else now + lifetime_s,
            "revoked_at": None,
        }
        connection.execute(sa.insert(_table).values(hash=_hash(secret), lifetime_s=lifetime_s, **row))
        return NewKey(key_of(row), secret)


def _new_secret() -> str:
    return f"sk-ot-{secrets.token_urlsafe(32)}"


def _hash(secret: str) -> str:
    # A plain hash is enough: the secrets are 256 random bits, which nobody guesses however fast the hash is.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _refusal(key: ApiKey, tenant: Tenant, now: int) -> str | None:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is not None and key.expires_at <= now:
        return "expired"
    return None if tenant.disabled_at is None else "disabled"


def _check(scopes: Collection[str], name: str, expires_at: int | None, now: int) -> None:
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise ConfigError(f"scopes are {', '.join(unknown) or 'none'}; use some of {', '.join(SCOPES)}")
    if len(name) > _NAME_LENGTH:
        raise ConfigError(f"the key's name has {len(name)} characters; use at most {_NAME_LENGTH}")
    if expires_at is not None and expires_at <= now:
        raise ConfigError(f"expires_at is {expires_at}, which has passed; choose a time after {now}")


def _unknown(key_id: str) -> NotFoundError:
    return NotFoundError(f"no key {key_id[:80]!r}; `key list` shows those that are there")
