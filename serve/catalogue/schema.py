"""The tables, as SQLAlchemy knows them; migrations/ brings a database to them.

Times are whole seconds since 1970. Rows as Python objects are in records.py, queries beside their table's class."""

from __future__ import annotations

import sqlalchemy as sa

from serve.catalogue.columns import (
    Position,
    Text,
    job,
    json,
    number,
    position,
    row_id,
    table,
    tenant,
    text,
    time,
)
from serve.catalogue.columns import metadata as metadata
from serve.catalogue.gradient_schema import gradient_auxiliaries as gradient_auxiliaries
from serve.catalogue.gradient_schema import gradient_operations as gradient_operations
from serve.catalogue.gradient_schema import gradient_sessions as gradient_sessions
from serve.catalogue.gradient_schema import gradient_turns as gradient_turns

tenants = table(
    "tenants",
    position(),
    row_id(),
    sa.Column("name", Text, unique=True, nullable=False),
    time("created_at", nullable=False),
    time("disabled_at"),
    json("limits", nullable=False),
)

api_keys = table(
    "api_keys",
    position(),
    row_id(),
    tenant(),
    text("name", nullable=False),
    sa.Column("hash", Text, unique=True, nullable=False),
    text("hint", nullable=False),
    json("scopes", nullable=False),
    time("created_at", nullable=False),
    time("expires_at"),
    time("revoked_at"),
    number("lifetime_s"),
    sa.Index("ix_api_keys_listing", "tenant_id", "created_at", "position"),
)

files = table(
    "files",
    position(),
    row_id(),
    tenant(),
    text("filename", nullable=False),
    number("bytes", nullable=False),
    text("sha256", nullable=False),
    text("purpose", nullable=False),
    text("status", nullable=False),
    text("status_details"),
    time("created_at", nullable=False),
    time("expires_at"),
    time("deleted_at"),
    sa.Index("ix_files_listing", "tenant_id", "created_at", "position"),
    sa.Index("ix_files_expires_at", "expires_at"),
)

jobs = table(
    "jobs",
    position(),
    row_id(),
    tenant(),
    text("status", nullable=False),
    text("stage"),
    text("wanted", nullable=False),
    number("attempt", nullable=False, default=0),
    text("submission_id"),
    text("model", nullable=False),
    text("suffix"),
    number("seed", nullable=False),
    json("method", nullable=False),
    json("hyperparameters", nullable=False),
    json("resolved"),
    text("training_file", nullable=False),
    text("validation_file"),
    json("metadata"),
    time("created_at", nullable=False),
    time("queued_at"),
    time("started_at"),
    time("launched_at"),
    time("finished_at"),
    time("cleaned_at"),
    time("estimated_finish"),
    number("tokens"),
    number("trained_tokens"),
    text("fine_tuned_model"),
    json("error"),
    json("result_files", nullable=False),
    json("bundle", nullable=False),
    sa.Index("ix_jobs_listing", "tenant_id", "created_at", "position"),
    sa.Index("ix_jobs_status", "status", "tenant_id"),
    sa.Index("ix_jobs_cleaned_at", "cleaned_at"),
)

job_metadata = table(
    "job_metadata",
    sa.Column("job_id", Text, sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("key", Text, primary_key=True),
    text("value", nullable=False),
)

job_events = table(
    "job_events",
    position(),
    row_id(),
    job(),
    number("seq", nullable=False),
    time("created_at", nullable=False),
    text("level", nullable=False),
    text("type", nullable=False),
    text("message", nullable=False),
    json("data"),
    text("source_key"),
    sa.UniqueConstraint("job_id", "seq", name="uq_job_events_seq"),
    sa.UniqueConstraint("job_id", "source_key", name="uq_job_events_source_key"),
)

checkpoints = table(
    "checkpoints",
    position(),
    row_id(),
    job(),
    tenant(),
    number("step_number", nullable=False),
    json("metrics", nullable=False),
    text("fine_tuned_model_checkpoint", nullable=False),
    time("created_at", nullable=False),
    sa.UniqueConstraint("job_id", "step_number", name="uq_checkpoints_step_number"),
)

adapters = table(
    "adapters",
    position(),
    row_id(),
    tenant(),
    json("bundle", nullable=False),
    text("suffix", nullable=False),
    text("state", nullable=False),
    json("files", nullable=False),
    json("reasons", nullable=False),
    json("report"),
    text("model_id"),
    number("bytes", nullable=False),
    time("created_at", nullable=False),
    time("touched_at", nullable=False),
    time("finished_at"),
    sa.Index("ix_adapters_listing", "tenant_id", "created_at", "position"),
    sa.Index("ix_adapters_state", "state"),
)

idempotency = table(
    "idempotency",
    sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("key", Text, primary_key=True),
    text("fingerprint", nullable=False),
    text("nonce", nullable=False),
    text("holder"),
    text("state", nullable=False),
    number("status"),
    text("body"),
    time("created_at", nullable=False),
    time("begun_at", nullable=False),
    sa.Index("ix_idempotency_created_at", "created_at"),
)

request_counts = table(
    "request_counts",
    sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("minute", sa.BigInteger, primary_key=True, autoincrement=False),
    number("count", nullable=False),
)

token_counts = table(
    "token_counts",
    sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
    number("tokens", nullable=False),
)

webhooks = table(
    "webhooks",
    position(),
    row_id(),
    tenant(),
    text("name", nullable=False),
    text("url", nullable=False),
    text("secret", nullable=False),
    text("previous_secret"),
    time("previous_until"),
    json("events", nullable=False),
    time("created_at", nullable=False),
    time("updated_at", nullable=False),
    time("disabled_at"),
    sa.Index("ix_webhooks_listing", "tenant_id", "created_at", "position"),
)

deliveries = table(
    "deliveries",
    position(),
    row_id(),
    sa.Column("webhook_id", Text, sa.ForeignKey("webhooks.id"), nullable=False),
    tenant(),
    text("type", nullable=False),
    text("object_id", nullable=False),
    json("payload", nullable=False),
    number("attempts", nullable=False, default=0),
    time("created_at", nullable=False),
    time("next_at"),
    time("delivered_at"),
    time("failed_at"),
    text("last_error"),
    sa.UniqueConstraint("webhook_id", "type", "object_id", name="uq_deliveries_event"),
    sa.Index("ix_deliveries_next_at", "next_at"),
)

audit = table(
    "audit",
    sa.Column("seq", Position, primary_key=True, autoincrement=True),
    time("at", nullable=False),
    text("tenant_id"),
    text("key_id"),
    text("action", nullable=False),
    text("target", nullable=False),
    text("outcome", nullable=False),
    json("detail", nullable=False),
    text("request_id"),
)

leases = table(
    "leases",
    sa.Column("name", Text, primary_key=True),
    text("holder", nullable=False),
    time("expires_at", nullable=False),
)
