"""Which operations of gradient learning may be begun, in whose turn.

Beginning them is in gradient_operations.py."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from serve.catalogue import schema

_table = schema.gradient_operations
_turns = schema.gradient_turns
UNENDED = ("queued", "running")
"""Statuses of operations that are not over."""


def free(now: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """What nobody works on: it waits, or whoever had it has been silent for its lease."""
    lost = sa.and_(_table.c.status == "running", _table.c.lease_until <= now)
    return sa.or_(_table.c.status == "queued", lost)


def until(now: sa.ColumnElement[int], lease_s: float) -> sa.ColumnElement[int]:
    """When a lease that is given now ends."""
    return now + int(lease_s)


def claimable(holder: str, now: sa.ColumnElement[int]) -> sa.Select[Any, Any]:
    """Ids and tenants of what a holder may begin, in whose turn it is: of each session the first that is not over, if
    nobody else works on the same auxiliary. Tenants take turns, the one that was served longest ago first."""
    before, other = _table.alias(), _table.alias()
    first = sa.select(before.c.id).where(
        before.c.session_id == _table.c.session_id,
        before.c.number < _table.c.number,
        before.c.status.in_(UNENDED),
    )
    elsewhere = sa.select(other.c.id).where(
        other.c.auxiliary_id == _table.c.auxiliary_id,
        other.c.status == "running",
        other.c.holder != holder,
        other.c.lease_until > now,
    )
    place = sa.func.row_number().over(partition_by=_table.c.tenant_id, order_by=_table.c.position).label("place")
    found = sa.select(_table.c.id, _table.c.tenant_id, _table.c.position, place)
    found = found.where(free(now), ~first.exists(), ~elsewhere.exists()).subquery()
    query = sa.select(found.c.id, found.c.tenant_id).outerjoin(_turns, _turns.c.tenant_id == found.c.tenant_id)
    return query.order_by(found.c.place, sa.func.coalesce(_turns.c.turn, 0), found.c.position)
