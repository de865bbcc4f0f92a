"""Customers' endpoints that are told of events, and the deliveries that are due.

A delivery is a row before it is a request; when it is sent is controller/webhooks.py's, how webhook_requests.py's."""

from __future__ import annotations

import base64
import builtins
import secrets
from collections.abc import Collection
from functools import partial
from typing import Any

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.audit import Note, note
from serve.catalogue.database import Database, page
from serve.catalogue.records import Delivery, Page, Webhook, new_id, record

_table = schema.webhooks
_due = schema.deliveries
_webhook = partial(record, Webhook)
_delivery = partial(record, Delivery)
_OVERLAP_S = 24 * 3600
_NO_PREVIOUS: dict[str, object] = {"previous_secret": None, "previous_until": None}


class Webhooks:
    """The tables of webhooks and of their deliveries.

    An endpoint's secret stands in the column `secret` as it is, because signing needs it: whoever reads the database
    or a backup of it can sign in the service's name. Over HTTP it is shown at creation and rotation only.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: str,
        url: str,
        events: Collection[str],
        *,
        name: str = "webhook",
        webhook_id: str | None = None,
        most: int | None = None,
        audit: Note | None = None,
    ) -> Webhook | None:
        """Add an endpoint with a fresh secret; one that is there under the same id is returned. What addresses are
        allowed is checked by the caller.

        Args:
            webhook_id: the id to give; None makes one.
            most: endpoints that the tenant may have, this one included; None for no limit.

        Returns:
            The endpoint, or None if the tenant has `most` of them already; nothing is added then.
        """
        now = self._database.now()
        row = {
            "id": webhook_id or new_id("wh_"),
            "tenant_id": tenant_id,
            "name": name,
            "url": url,
            "secret": _new_secret(),
            "events": sorted(set(events)),
            "created_at": now,
            "updated_at": now,
        }
        with self._database.write() as connection:
            # Endpoints that one tenant adds at the same time are counted one after the other.
            tenants = schema.tenants
            connection.execute(sa.select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update(key_share=True))
            found = connection.execute(sa.select(_table).where(*_mine(tenant_id, row["id"]))).mappings().one_or_none()
            if found is not None:
                return _webhook(found)
            count = sa.select(sa.func.count()).select_from(_table)
            count = count.where(_table.c.tenant_id == tenant_id, _table.c.disabled_at.is_(None))
            if most is not None and connection.execute(count).scalar_one() >= most:
                return None
            note(connection, now, audit, row["id"])
            return _webhook(connection.execute(sa.insert(_table).values(row).returning(_table)).mappings().one())

    def get(self, tenant_id: str, webhook_id: str) -> Webhook:
        """A tenant's endpoint. Raises NotFoundError."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(_table).where(*_mine(tenant_id, webhook_id))).mappings().one_or_none()
        if row is None:
            raise _unknown(webhook_id)
        return _webhook(row)

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 20) -> Page[Webhook]:
        """A tenant's endpoints, the newest first. Raises NotFoundError for an unknown `after`."""
        where = [_table.c.tenant_id == tenant_id, _table.c.disabled_at.is_(None)]
        with self._database.read() as connection:
            return page(connection, _table, where, _webhook, after=after, limit=limit)

    def update(
        self,
        tenant_id: str,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Collection[str] | None = None,
        name: str | None = None,
        audit: Note | None = None,
    ) -> Webhook:
        """Change what is not None; from the next try on, what is on its way goes to the new address too.

        Raises:
            NotFoundError: the tenant has no such endpoint.
        """
        wanted = {"url": url, "events": None if events is None else sorted(set(events)), "name": name}
        with self._database.write() as connection:
            row = _locked(connection, tenant_id, webhook_id)
            values = {key: value for key, value in wanted.items() if value is not None and value != row[key]}
            return self._changed(connection, row, values, audit)

    def rotate_secret(
        self,
        tenant_id: str,
        webhook_id: str,
        *,
        key: bytes | None = None,
        keep_old: bool = False,
        audit: Note | None = None,
    ) -> Webhook:
        """Give an endpoint a fresh secret, which signs from the next try on. Raises NotFoundError.

        Args:
            key: the secret's 32 bytes; None draws them. An endpoint that has this very secret keeps all it has.
            keep_old: whether the old secret signs too, for a day.
        """
        fresh = _new_secret(key)
        with self._database.write() as connection:
            row = _locked(connection, tenant_id, webhook_id)
            if row["secret"] == fresh:
                return _webhook(row)
            ends = self._database.now() + _OVERLAP_S
            kept = {"previous_secret": row["secret"], "previous_until": ends} if keep_old else _NO_PREVIOUS
            return self._changed(connection, row, {"secret": fresh, **kept}, audit)

    def disable(self, tenant_id: str, webhook_id: str, audit: Note | None = None) -> Webhook:
        """Tell an endpoint nothing more and forget its secret; what is under way to it is given up.

        Raises:
            NotFoundError: the tenant has no such endpoint.
        """
        now = self._database.now()
        with self._database.write() as connection:
            gone = {"disabled_at": now, "secret": "", **_NO_PREVIOUS}
            change = sa.update(_table).where(*_mine(tenant_id, webhook_id)).values(gone)
            row = connection.execute(change.returning(_table)).mappings().one_or_none()
            if row is None:
                raise _unknown(webhook_id)
            note(connection, now, audit, webhook_id)
            open_ones = sa.update(_due).where(_due.c.webhook_id == webhook_id, _due.c.next_at.is_not(None))
            connection.execute(open_ones.values(next_at=None, failed_at=now, last_error="the endpoint was removed"))
            return _webhook(row)

    def due(self, now: int, limit: int = 100) -> builtins.list[tuple[Delivery, Webhook]]:
        """For each endpoint the delivery that has been due for longest, so that none hides another's."""
        rank = sa.func.row_number().over(
            partition_by=_due.c.webhook_id, order_by=(_due.c.next_at.asc(), _due.c.position.asc())
        )
        ranked = sa.select(_due, rank.label("rank")).where(_due.c.next_at <= now).subquery()
        query = sa.select(ranked).where(ranked.c.rank == 1).order_by(ranked.c.next_at, ranked.c.position).limit(limit)
        with self._database.read() as connection:
            deliveries = [_delivery(row) for row in connection.execute(query).mappings()]
            ids = {delivery.webhook_id for delivery in deliveries}
            rows = connection.execute(sa.select(_table).where(_table.c.id.in_(ids))).mappings()
            webhooks = {row["id"]: _webhook(row) for row in rows}
        return [(delivery, webhooks[delivery.webhook_id]) for delivery in deliveries]

    def deliveries(self, tenant_id: str) -> builtins.list[Delivery]:
        """Every delivery to a tenant's endpoints, the first made first."""
        query = sa.select(_due).where(_due.c.tenant_id == tenant_id).order_by(_due.c.position)
        with self._database.read() as connection:
            return [_delivery(row) for row in connection.execute(query).mappings()]

    def claim(self, delivery: Delivery, until: int) -> int | None:
        """Keep others from trying a delivery before `until`.

        Returns:
            Which try this is, from 1 on, to settle it by; None if another was first.
        """
        seen = sa.update(_due).where(
            _due.c.id == delivery.id, _due.c.next_at == delivery.next_at, _due.c.attempts == delivery.attempts
        )
        claimed = seen.values(next_at=until, attempts=_due.c.attempts + 1).returning(_due.c.attempts)
        with self._database.write() as connection:
            return connection.execute(claimed).scalar_one_or_none()

    def delivered(self, delivery_id: str, attempt: int) -> None:
        """The endpoint took it at this try, unless another has begun since."""
        self._settle(delivery_id, attempt, next_at=None, delivered_at=self._database.now(), last_error=None)

    def not_delivered(self, delivery_id: str, attempt: int, again: int | None, error: str) -> None:
        """The endpoint did not take it at this try; the next is at `again`, or there is none."""
        failed_at = self._database.now() if again is None else None
        self._settle(delivery_id, attempt, next_at=again, failed_at=failed_at, last_error=error[:500])

    def sweep(self, keep_s: int) -> None:
        """Forget deliveries that were made or given up, and endpoints that were removed, so many seconds ago; and
        secrets whose time is over."""
        now = self._database.now()
        before = now - keep_s
        settled = sa.func.coalesce(_due.c.delivered_at, _due.c.failed_at) <= before
        used = sa.select(_due.c.id).where(_due.c.webhook_id == _table.c.id).exists()
        with self._database.write() as connection:
            connection.execute(sa.delete(_due).where(_due.c.next_at.is_(None), settled))
            connection.execute(sa.delete(_table).where(_table.c.disabled_at <= before, ~used))
            connection.execute(sa.update(_table).where(_table.c.previous_until <= now).values(_NO_PREVIOUS))

    def _changed(
        self, connection: sa.Connection, row: sa.RowMapping, values: dict[str, object], audit: Note | None
    ) -> Webhook:
        if not values:
            return _webhook(row)
        now = self._database.now()
        note(connection, now, audit, row["id"], changed=sorted(values.keys() & {"url", "events", "name"}))
        change = sa.update(_table).where(_table.c.id == row["id"]).values(**values, updated_at=now)
        return _webhook(connection.execute(change.returning(_table)).mappings().one())

    def _settle(self, delivery_id: str, attempt: int, **values: object) -> None:
        still = sa.update(_due).where(_due.c.id == delivery_id, _due.c.attempts == attempt, _due.c.next_at.is_not(None))
        with self._database.write() as connection:
            connection.execute(still.values(**values))


def announce(connection: sa.Connection, tenant_id: str, type: str, object_id: str, now: int) -> None:
    """Add a delivery for each of the tenant's endpoints that asks for events of this type.

    It belongs into the transaction that makes the event true."""
    query = sa.select(_table.c.id, _table.c.events).where(
        _table.c.tenant_id == tenant_id, _table.c.disabled_at.is_(None)
    )
    # An endpoint that is being removed at this moment either gets nothing, or loses what it gets with the rest.
    query = query.with_for_update(read=True)
    for webhook_id, events in connection.execute(query).all():
        if type not in events:
            continue
        event_id = new_id("evt_")
        connection.execute(
            sa.insert(_due).values(
                id=event_id,
                webhook_id=webhook_id,
                tenant_id=tenant_id,
                type=type,
                object_id=object_id,
                payload=webhook_event(event_id, type, object_id, now),
                created_at=now,
                next_at=now,
            )
        )


def webhook_event(event_id: str, type: str, object_id: str, now: int) -> dict[str, Any]:
    """What an endpoint is sent: an event in OpenAI's shape, which names the object that it is about and no more."""
    return {"object": "event", "id": event_id, "type": type, "created_at": now, "data": {"id": object_id}}


def _locked(connection: sa.Connection, tenant_id: str, webhook_id: str) -> sa.RowMapping:
    locked = sa.select(_table).where(*_mine(tenant_id, webhook_id)).with_for_update(key_share=True)
    row = connection.execute(locked).mappings().one_or_none()
    if row is None:
        raise _unknown(webhook_id)
    return row


def _new_secret(key: bytes | None = None) -> str:
    return f"whsec_{base64.b64encode(key or secrets.token_bytes(32)).decode()}"


def _mine(tenant_id: str, webhook_id: str) -> builtins.list[sa.ColumnElement[bool]]:
    return [_table.c.id == webhook_id, _table.c.tenant_id == tenant_id, _table.c.disabled_at.is_(None)]


def _unknown(webhook_id: str) -> NotFoundError:
    return NotFoundError(f"no webhook endpoint {webhook_id[:80]!r}")
