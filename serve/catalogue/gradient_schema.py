"""The tables of gradient learning, as SQLAlchemy knows them; the service's others are in schema.py.

Rows as Python objects are in records.py."""

from __future__ import annotations

import sqlalchemy as sa

from serve.catalogue.columns import Text, json, number, position, row_id, table, tenant, text, time


def _auxiliary() -> sa.Column[str]:
    return sa.Column("auxiliary_id", Text, sa.ForeignKey("gradient_auxiliaries.id"), nullable=False)


gradient_auxiliaries = table(
    "gradient_auxiliaries",
    position(),
    row_id(),
    tenant(),
    text("group"),
    number("version", nullable=False, default=0),
    text("key"),
    time("created_at", nullable=False),
)

gradient_sessions = table(
    "gradient_sessions",
    position(),
    row_id(),
    tenant(),
    _auxiliary(),
    text("status", nullable=False),
    text("model", nullable=False),
    text("group"),
    json("settings", nullable=False),
    number("next_number", nullable=False, default=0),
    time("created_at", nullable=False),
    time("used_at", nullable=False),
    time("expires_at", nullable=False),
    time("closed_at"),
    time("cleaned_at"),
    sa.Index("ix_gradient_sessions_listing", "tenant_id", "created_at", "position"),
    sa.Index("ix_gradient_sessions_status", "status", "expires_at"),
    sa.Index("ix_gradient_sessions_group", "tenant_id", "group"),
    sa.Index("ix_gradient_sessions_auxiliary_id", "auxiliary_id"),
)

gradient_operations = table(
    "gradient_operations",
    position(),
    row_id(),
    sa.Column("session_id", Text, sa.ForeignKey("gradient_sessions.id"), nullable=False),
    tenant(),
    _auxiliary(),
    number("number", nullable=False),
    text("kind", nullable=False),
    text("digest", nullable=False),
    number("rows", nullable=False, default=0),
    json("request", nullable=False),
    text("status", nullable=False),
    text("holder"),
    number("attempt", nullable=False, default=0),
    time("lease_until"),
    number("version"),
    json("result"),
    json("error"),
    time("created_at", nullable=False),
    time("finished_at"),
    time("dropped_at"),
    sa.UniqueConstraint("session_id", "number", name="uq_gradient_operations_number"),
    sa.Index("ix_gradient_operations_status", "status", "position"),
    sa.Index("ix_gradient_operations_auxiliary_id", "auxiliary_id", "status"),
)

gradient_turns = table(
    "gradient_turns",
    sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), primary_key=True),
    number("turn", nullable=False),
)
