"""Customers' endpoints that are told of events, and the deliveries that are due.

Signing and sending is left to controller/webhooks.py; a delivery is a row before it is a request."""

from __future__ import annotations

import base64
import builtins
import secrets
from collections.abc import Collection
from functools import partial

import sqlalchemy as sa

from ot_ray.errors import NotFoundError
from serve.catalogue import schema
from serve.catalogue.database import Database, page
from serve.catalogue.records import Delivery, Page, Webhook, new_id, record

_table = schema.webhooks
_due = schema.deliveries
_webhook = partial(record, Webhook)
_delivery = partial(record, Delivery)


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

    def rotate_secret(self, tenant_id: str, webhook_id: str, *, key: bytes | None = None) -> Webhook:
        """Give an endpoint a fresh secret, which signs from the next try on. Raises NotFoundError.

        Args:
            key: the secret's 32 bytes; None draws them.
        """
        change = sa.update(_table).where(*_mine(tenant_id, webhook_id))
        with self._database.write() as connection:
            fresh = change.values(secret=_new_secret(key), updated_at=self._database.now())
            row = connection.execute(fresh.returning(_table)).mappings().one_or_none()
        if row is None:
            raise _unknown(webhook_id)
        return _webhook(row)

    def disable(self, tenant_id: str, webhook_id: str) -> Webhook:
        """Tell an endpoint nothing more and forget its secret; what is under way to it is given up.

        Raises:
            NotFoundError: the tenant has no such endpoint.
        """
        now = self._database.now()
        with self._database.write() as connection:
            change = sa.update(_table).where(*_mine(tenant_id, webhook_id)).values(disabled_at=now, secret="")
            row = connection.execute(change.returning(_table)).mappings().one_or_none()
            if row is None:
                raise _unknown(webhook_id)
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
        payload = {"object": "event", "id": event_id, "type": type, "created_at": now, "data": {"id": object_id}}
        connection.execute(
            sa.insert(_due).values(
                id=event_id,
                webhook_id=webhook_id,
                tenant_id=tenant_id,
                type=type,
                object_id=object_id,
                payload=payload,
                created_at=now,
                next_at=now,
            )
        )


def _new_secret(key: bytes | None = None) -> str:
    return f"whsec_{base64.b64encode(key or secrets.token_bytes(32)).decode()}"


def _mine(tenant_id: str, webhook_id: str) -> builtins.list[sa.ColumnElement[bool]]:
    return [_table.c.id == webhook_id, _table.c.tenant_id == tenant_id, _table.c.disabled_at.is_(None)]


def _unknown(webhook_id: str) -> NotFoundError:
    return NotFoundError(f"no webhook endpoint {webhook_id[:80]!r}")
