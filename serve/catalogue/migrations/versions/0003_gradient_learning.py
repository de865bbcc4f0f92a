"""Sessions of gradient learning, their auxiliaries and their operations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "gradient_auxiliaries",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("group", sa.Text(), nullable=True),
        sa.Column("version", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_gradient_auxiliaries_tenant_id"),
        sa.PrimaryKeyConstraint("position", name="pk_gradient_auxiliaries"),
        sa.UniqueConstraint("id", name="uq_gradient_auxiliaries_id"),
        sqlite_autoincrement=True,
    )
    _sessions()
    _operations()
    op.create_table(
        "gradient_turns",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_gradient_turns_tenant_id"),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_gradient_turns"),
        sqlite_autoincrement=True,
    )


def _sessions() -> None:
    op.create_table(
        "gradient_sessions",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("auxiliary_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("group", sa.Text(), nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("next_number", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("closed_at", sa.BigInteger(), nullable=True),
        sa.Column("cleaned_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_gradient_sessions_tenant_id"),
        sa.ForeignKeyConstraint(
            ["auxiliary_id"], ["gradient_auxiliaries.id"], name="fk_gradient_sessions_auxiliary_id"
        ),
        sa.PrimaryKeyConstraint("position", name="pk_gradient_sessions"),
        sa.UniqueConstraint("id", name="uq_gradient_sessions_id"),
        sqlite_autoincrement=True,
    )
    for name, columns in (
        ("listing", ["tenant_id", "created_at", "position"]),
        ("status", ["status", "expires_at"]),
        ("group", ["tenant_id", "group"]),
        ("auxiliary_id", ["auxiliary_id"]),
    ):
        op.create_index(f"ix_gradient_sessions_{name}", "gradient_sessions", columns, unique=False)


def _operations() -> None:
    op.create_table(
        "gradient_operations",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("auxiliary_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("rows", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=True),
        sa.Column("attempt", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.Column("dropped_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["session_id"], ["gradient_sessions.id"], name="fk_gradient_operations_session_id"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_gradient_operations_tenant_id"),
        sa.ForeignKeyConstraint(
            ["auxiliary_id"], ["gradient_auxiliaries.id"], name="fk_gradient_operations_auxiliary_id"
        ),
        sa.PrimaryKeyConstraint("position", name="pk_gradient_operations"),
        sa.UniqueConstraint("id", name="uq_gradient_operations_id"),
        sa.UniqueConstraint("session_id", "number", name="uq_gradient_operations_number"),
        sqlite_autoincrement=True,
    )
    for name, columns in (("status", ["status", "position"]), ("auxiliary_id", ["auxiliary_id", "status"])):
        op.create_index(f"ix_gradient_operations_{name}", "gradient_operations", columns, unique=False)
