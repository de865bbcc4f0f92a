"""What was answered to a POST with an `Idempotency-Key`, so that the same request again has no second effect.

What counts as the same request, and what a client is told, is decided in routes/once.py."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import sqlalchemy as sa

from serve.catalogue import schema
from serve.catalogue.database import Database

_table = schema.idempotency


@dataclass(frozen=True)
class Begun:
    """The request is this caller's to carry out.

    The nonce stays the same when another takes the request over after a crash: ids that follow from it name the same
    things, so that what the first one made before it died is found and not made again."""

    nonce: str
    holder: str
    taken_over: bool = False
    """Another began it before, and nobody knows how far it got."""


@dataclass(frozen=True)
class Answered:
    """The request was carried out before, and answered so."""

    status: int
    body: str


@dataclass(frozen=True)
class Busy:
    """Another carries the request out now."""

    seconds: int
    """After which it counts as dead."""


@dataclass(frozen=True)
class Reused:
    """The key belongs to another request."""


class Idempotency:
    """The table of requests that were begun or answered under a key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(
        self, tenant_id: str, key: str, fingerprint: str, *, stale_s: int = 60, keep_s: int = 24 * 3600
    ) -> Begun | Answered | Busy | Reused:
        """Take a request on, or learn why not; of any number that ask at once, one gets it.

        Args:
            fingerprint: what the request asks for; the same key with another is refused.
            stale_s: seconds after which one that was begun, and neither settled nor held on to, is taken over.
            keep_s: seconds for which a key is remembered.
        """
        now, shared_now = self._database.now(), self._database.shared_now()
        nonce, holder = secrets.token_hex(16), secrets.token_hex(16)
        fresh = {"fingerprint": fingerprint, "state": "in_progress", "created_at": now, "begun_at": shared_now}
        fresh |= {"nonce": nonce, "holder": holder}
        mine = (_table.c.tenant_id == tenant_id, _table.c.key == key)
        with self._database.write() as connection:
            connection.execute(sa.delete(_table).where(*mine, _table.c.created_at <= now - keep_s))
            added = self._database.insert(_table).values(tenant_id=tenant_id, key=key, **fresh)
            added = added.on_conflict_do_nothing(index_elements=["tenant_id", "key"]).returning(_table.c.key)
            if connection.execute(added).one_or_none() is not None:
                return Begun(nonce, holder)
            locked = sa.select(_table).where(*mine).with_for_update(key_share=True)
            row = connection.execute(locked).mappings().one_or_none()
            if row is None:
                return Busy(1)  # it was released between the two statements
            if row["fingerprint"] != fingerprint:
                return Reused()
            if row["state"] == "done":
                return Answered(row["status"], row["body"])
            left = row["begun_at"] + stale_s - connection.execute(sa.select(shared_now)).scalar_one()
            if row["holder"] is not None and left > 0:
                return Busy(left)
            connection.execute(sa.update(_table).where(*mine).values(holder=holder, begun_at=shared_now))
            return Begun(row["nonce"], holder, taken_over=True)

    def hold(self, tenant_id: str, key: str, holder: str) -> bool:
        """Say that a request is still being carried out; False if it was settled, or another has taken it over."""
        alive = sa.update(_table).where(*_held(tenant_id, key, holder)).values(begun_at=self._database.shared_now())
        with self._database.write() as connection:
            return connection.execute(alive.returning(_table.c.key)).one_or_none() is not None

    def finish(self, tenant_id: str, key: str, holder: str, status: int, body: str) -> None:
        """Remember the answer, unless another has taken the request over."""
        self._settle(tenant_id, key, holder, state="done", status=status, body=body)

    def forget(self, tenant_id: str, key: str, holder: str) -> None:
        """The request had no effect: the key is free again."""
        with self._database.write() as connection:
            connection.execute(sa.delete(_table).where(*_held(tenant_id, key, holder)))

    def leave(self, tenant_id: str, key: str, holder: str) -> None:
        """Nobody knows whether the request had an effect: the next one takes it over at once, with the same nonce."""
        self._settle(tenant_id, key, holder)

    def sweep(self, keep_s: int = 24 * 3600) -> None:
        """Forget keys after their time."""
        with self._database.write() as connection:
            connection.execute(sa.delete(_table).where(_table.c.created_at <= self._database.now() - keep_s))

    def _settle(self, tenant_id: str, key: str, holder: str, **values: object) -> None:
        change = sa.update(_table).where(*_held(tenant_id, key, holder))
        with self._database.write() as connection:
            connection.execute(change.values(holder=None, **values))


def _held(tenant_id: str, key: str, holder: str) -> tuple[sa.ColumnElement[bool], ...]:
    return _table.c.tenant_id == tenant_id, _table.c.key == key, _table.c.holder == holder
