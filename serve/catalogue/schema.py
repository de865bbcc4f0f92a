"""The tables, as SQLAlchemy knows them; migrations/ brings a database to them.

Times are whole seconds since 1970. Rows as Python objects are in records.py, queries beside their table's class."""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class Text(TypeDecorator[str]):
    """Text of any origin: what no database stores (NUL, halves of surrogate pairs) becomes U+FFFD.

    An id that holds such a character is compared like any other and names nothing."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return value if value is None else _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)


_JSON = sa.JSON(none_as_null=True)
_Position = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _position() -> sa.Column[int]:
    """Insertion order, which tells rows of one second apart in a listing."""
    return sa.Column("position", _Position, primary_key=True, autoincrement=True)


def _id() -> sa.Column[str]:
    return sa.Column("id", Text, unique=True, nullable=False)


def _tenant() -> sa.Column[str]:
    return sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), nullable=False)


def _job() -> sa.Column[str]:
    return sa.Column("job_id", Text, sa.ForeignKey("jobs.id"), nullable=False)


def _text(name: str, nullable: bool = True) -> sa.Column[str]:
    return sa.Column(name, Text, nullable=nullable)


def _json(name: str, nullable: bool = True) -> sa.Column[Any]:
    return sa.Column(name, _JSON, nullable=nullable)


def _number(name: str, nullable: bool = True, default: int | None = None) -> sa.Column[int]:
    stated = None if default is None else str(default)
    return sa.Column(name, sa.BigInteger, nullable=nullable, server_default=stated)


def _time(name: str, nullable: bool = True) -> sa.Column[int]:
    return _number(name, nullable)


def _table(name: str, *parts: Any) -> sa.Table:
    # Without AUTOINCREMENT, SQLite gives the number of a deleted last row to the next one.
    return sa.Table(name, metadata, *parts, sqlite_autoincrement=True)


tenants = _table(
    "tenants",
    _position(),
    _id(),
    sa.Column("name", Text, unique=True, nullable=False),
    _time("created_at", nullable=False),
    _time("disabled_at"),
    _json("limits", nullable=False),
)

api_keys = _table(
    "api_keys",
    _position(),
    _id(),
    _tenant(),
    _text("name", nullable=False),
    sa.Column("hash", Text, unique=True, nullable=False),
    _text("hint", nullable=False),
    _json("scopes", nullable=False),
    _time("created_at", nullable=False),
    _time("expires_at"),
    _time("revoked_at"),
    _number("lifetime_s"),
    sa.Index("ix_api_keys_listing", "tenant_id", "created_at", "position"),
)

files = _table(
    "files",
    _position(),
    _id(),
    _tenant(),
    _text("filename", nullable=False),
    _number("bytes", nullable=False),
    _text("sha256", nullable=False),
    _text("purpose", nullable=False),
    _text("status", nullable=False),
    _text("status_details"),
    _time("created_at", nullable=False),
    _time("expires_at"),
    _time("deleted_at"),
    sa.Index("ix_files_listing", "tenant_id", "created_at", "position"),
    sa.Index("ix_files_expires_at", "expires_at"),
)

jobs = _table(
    "jobs",
    _position(),
    _id(),
    _tenant(),
    _text("status", nullable=False),
    _text("stage"),
    _text("wanted", nullable=False),
    _number("attempt", nullable=False, default=0),
    _text("submission_id"),
    _text("model", nullable=False),
    _text("suffix"),
    _number("seed", nullable=False),
    _json("method", nullable=False),
    _json("hyperparameters", nullable=False),
    _json("resolved"),
    _text("training_file", nullable=False),
    _text("validation_file"),
    _json("metadata"),
    _time("created_at", nullable=False),
    _time("queued_at"),
    _time("started_at"),
    _time("launched_at"),
    _time("finished_at"),
    _time("cleaned_at"),
    _time("estimated_finish"),
    _number("tokens"),
    _number("trained_tokens"),
    _text("fine_tuned_model"),
    _json("error"),
    _json("result_files", nullable=False),
    _json("bundle", nullable=False),
    sa.Index("ix_jobs_listing", "tenant_id", "created_at", "position"),
    sa.Index("ix_jobs_status", "status", "tenant_id"),
    sa.Index("ix_jobs_cleaned_at", "cleaned_at"),
)

job_metadata = _table(
    "job_metadata",
    sa.Column("job_id", Text, sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("key", Text, primary_key=True),
    _text("value", nullable=False),
)

job_events = _table(
    "job_events",
    _position(),
    _id(),
    _job(),
    _number("seq", nullable=False),
    _time("created_at", nullable=False),
    _text("level", nullable=False),
    _text("type", nullable=False),
    _text("message", nullable=False),
    _json("data"),
    _text("source_key"),
    sa.UniqueConstraint("job_id", "seq", name="uq_job_events_seq"),
    sa.UniqueConstraint("job_id", "source_key", name="uq_job_events_source_key"),
)

checkpoints = _table(
    "checkpoints",
    _position(),
    _id(),
    _job(),
    _tenant(),
    _number("step_number", nullable=False),
    _json("metrics", nullable=False),
    _text("fine_tuned_model_checkpoint", nullable=False),
    _time("created_at", nullable=False),
    sa.UniqueConstraint("job_id", "step_number", name="uq_checkpoints_step_number"),
)

adapters = _table(
    "adapters",
    _position(),
    _id(),
    _tenant(),
    _json("bundle", nullable=False),
    _text("suffix", nullable=False),
    _text("state", nullable=False),
    _json("files", nullable=False),
    _json("reasons", nullable=False),
    _json("report"),
    _text("model_id"),
    _number("bytes", nullable=False),
    _time("created_at", nullable=False),
    _time("touched_at", nullable=False),
    _time("finished_at"),
    sa.Index("ix_adapters_listing", "tenant_id", "created_at", "position"),
    sa.Index("ix_adapters_state", "state"),
)

idempotency = _table(
    "idempotency",
    sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("key", Text, primary_key=True),
    _text("fingerprint", nullable=False),
    _text("nonce", nullable=False),
    _text("holder"),
    _text("state", nullable=False),
    _number("status"),
    _text("body"),
    _time("created_at", nullable=False),
    _time("begun_at", nullable=False),
    sa.Index("ix_idempotency_created_at", "created_at"),
)

request_counts = _table(
    "request_counts",
    sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("minute", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("count", nullable=False),
)

token_counts = _table(
    "token_counts",
    sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("tokens", nullable=False),
)

webhooks = _table(
    "webhooks",
    _position(),
    _id(),
    _tenant(),
    _text("name", nullable=False),
    _text("url", nullable=False),
    _text("secret", nullable=False),
    _text("previous_secret"),
    _time("previous_until"),
    _json("events", nullable=False),
    _time("created_at", nullable=False),
    _time("updated_at", nullable=False),
    _time("disabled_at"),
    sa.Index("ix_webhooks_listing", "tenant_id", "created_at", "position"),
)

deliveries = _table(
    "deliveries",
    _position(),
    _id(),
    sa.Column("webhook_id", Text, sa.ForeignKey("webhooks.id"), nullable=False),
    _tenant(),
    _text("type", nullable=False),
    _text("object_id", nullable=False),
    _json("payload", nullable=False),
    _number("attempts", nullable=False, default=0),
    _time("created_at", nullable=False),
    _time("next_at"),
    _time("delivered_at"),
    _time("failed_at"),
    _text("last_error"),
    sa.UniqueConstraint("webhook_id", "type", "object_id", name="uq_deliveries_event"),
    sa.Index("ix_deliveries_next_at", "next_at"),
)

audit = _table(
    "audit",
    sa.Column("seq", _Position, primary_key=True, autoincrement=True),
    _time("at", nullable=False),
    _text("tenant_id"),
    _text("key_id"),
    _text("action", nullable=False),
    _text("target", nullable=False),
    _text("outcome", nullable=False),
    _json("detail", nullable=False),
    _text("request_id"),
)

leases = _table(
    "leases",
    sa.Column("name", Text, primary_key=True),
    _text("holder", nullable=False),
    _time("expires_at", nullable=False),
)
