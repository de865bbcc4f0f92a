"""Rows of the database as frozen Python objects, and the words their columns hold.

Times are whole seconds since 1970. How rows are read and written is beside each table's class."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from ot_ray.config import Config

T = TypeVar("T")

Scope = Literal["files", "jobs", "inference", "offsite", "cola", "admin"]
SCOPES: tuple[Scope, ...] = ("files", "jobs", "inference", "offsite", "cola", "admin")

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
"""Statuses that a job never leaves."""
Stage = Literal["launching", "training", "accepting", "promoting"]
Wanted = Literal["run", "cancel", "pause"]
GradientKind = Literal["forward_backward", "load", "step", "sample", "save"]
GradientStatus = Literal["queued", "running", "succeeded", "failed"]
AdapterState = Literal["receiving", "received", "inspecting", "accepted", "rejected"]


def new_id(prefix: str) -> str:
    """A fresh id: the prefix and 24 random hexadecimal digits."""
    return prefix + secrets.token_hex(12)


class TenantLimits(Config):
    """What one tenant may use."""

    running_jobs: int = Field(default=1, ge=0)
    """Tuning jobs that run at once; further ones wait in the queue."""
    queued_jobs: int = Field(default=10, ge=0)
    """Tuning jobs that wait; further ones are answered 429."""
    tokens_per_day: int = Field(default=10_000_000, ge=0, le=2**62)
    """Tokens that tuning jobs started within one day (UTC) train on; further jobs wait for the next day."""
    requests_per_minute: int = Field(default=600, ge=0)
    """Requests of all keys together; further ones are answered 429."""
    file_bytes: int = Field(default=50 * 2**30, ge=0, le=2**62)
    """Bytes of all files that the tenant keeps."""


@dataclass(frozen=True)
class Page(Generic[T]):
    """A piece of a listing."""

    items: list[T]
    has_more: bool


@dataclass(frozen=True)
class Tenant:
    """A customer's account."""

    id: str
    name: str
    created_at: int
    disabled_at: int | None
    limits: TenantLimits


@dataclass(frozen=True)
class ApiKey:
    """A key without its secret: only the secret's hash is stored."""

    id: str
    tenant_id: str
    name: str
    hint: str
    """The secret's last four characters."""
    scopes: frozenset[str]
    created_at: int
    expires_at: int | None
    revoked_at: int | None


@dataclass(frozen=True)
class File:
    """An uploaded file, or the results of a job; its bytes are in the store under `files/<tenant_id>/<id>`."""

    id: str
    tenant_id: str
    filename: str
    bytes: int
    sha256: str
    purpose: str
    status: str
    status_details: str | None
    created_at: int
    expires_at: int | None
    deleted_at: int | None


@dataclass(frozen=True)
class Job:
    """A tuning job as the customer asked for it, and where it stands."""

    id: str
    tenant_id: str
    status: JobStatus
    stage: Stage | None
    """Where a running job is; from promoting on, it can only succeed or fail."""
    wanted: Wanted
    """What the customer wants of it now; the controller acts on it."""
    attempt: int
    submission_id: str | None
    model: str
    suffix: str | None
    seed: int
    method: dict[str, Any]
    hyperparameters: dict[str, Any]
    """As they were asked for, `auto` included."""
    resolved: dict[str, Any] | None
    """As they are used, once the files are validated."""
    training_file: str
    validation_file: str | None
    metadata: dict[str, str] | None
    created_at: int
    queued_at: int | None
    started_at: int | None
    launched_at: int | None
    """When the present attempt was given to the launcher."""
    finished_at: int | None
    cleaned_at: int | None
    """When what an ended job left in the store was removed."""
    estimated_finish: int | None
    tokens: int | None
    """Counted when the files are validated."""
    trained_tokens: int | None
    fine_tuned_model: str | None
    error: dict[str, Any] | None
    """`{code, message, param}`"""
    result_files: list[str]
    bundle: dict[str, Any]
    """`{model, version, bundle_id}`"""


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's history."""

    id: str
    job_id: str
    seq: int
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any] | None
    source_key: str | None
    """The store's key that the event was taken from, so that it is taken once."""


@dataclass(frozen=True)
class Checkpoint:
    """The adapter at the end of an epoch."""

    id: str
    job_id: str
    tenant_id: str
    step_number: int
    metrics: dict[str, Any]
    fine_tuned_model_checkpoint: str
    created_at: int


@dataclass(frozen=True)
class Adapter:
    """An adapter that a customer tuned at home and sends, or has sent."""

    id: str
    tenant_id: str
    bundle: dict[str, Any]
    suffix: str
    state: AdapterState
    files: list[dict[str, Any]]
    """What the customer announced: `{name, bytes, sha256}` of each file."""
    reasons: list[str]
    report: dict[str, Any] | None
    model_id: str | None
    bytes: int
    created_at: int
    touched_at: int
    finished_at: int | None


@dataclass(frozen=True)
class Webhook:
    """An address of the customer's that is told of events."""

    id: str
    tenant_id: str
    name: str
    """For people."""
    url: str
    secret: str = dataclasses.field(repr=False)
    """`whsec_...`; signing needs the secret itself, so it is stored as it is."""
    previous_secret: str | None = dataclasses.field(repr=False)
    """The one before the last rotation, where it still signs too."""
    previous_until: int | None
    """When that ends."""
    events: list[str]
    created_at: int
    updated_at: int
    """When it or its secret was last changed."""
    disabled_at: int | None

    def secrets_at(self, now: int) -> list[str]:
        """The secrets that sign at a time, the present one first."""
        both = self.previous_secret is not None and self.previous_until is not None and now < self.previous_until
        return [self.secret, self.previous_secret] if both and self.previous_secret else [self.secret]


@dataclass(frozen=True)
class Delivery:
    """One event on its way to one webhook."""

    id: str
    webhook_id: str
    tenant_id: str
    type: str
    object_id: str
    payload: dict[str, Any]
    attempts: int
    created_at: int
    next_at: int | None
    """When it is tried next; None once it is delivered or given up."""
    delivered_at: int | None
    failed_at: int | None
    last_error: str | None


@dataclass(frozen=True)
class GradientAuxiliary:
    """An auxiliary model of gradient learning: one session's, or one that the sessions of a group share."""

    id: str
    tenant_id: str
    group: str | None
    """The group that shares it; None of one session's own."""
    version: int
    """How often it was changed."""
    key: str | None
    """The store's key of its present state; None for the fresh start that its session's settings say."""


@dataclass(frozen=True)
class GradientSession:
    """A customer's sequence of operations of gradient learning on one auxiliary."""

    id: str
    tenant_id: str
    status: Literal["open", "closed"]
    model: str
    group: str | None
    settings: dict[str, Any]
    """As they hold for it: `sites` (each with all its fields), `auxiliary`, `mode`, `group`, `fit`, `interval`,
    `fitting`, `metadata`."""
    auxiliary_id: str
    version: int
    """The auxiliary's, when the row was read."""
    next_number: int
    """Of the operation that is awaited."""
    created_at: int
    used_at: int
    expires_at: int
    """When it is closed, if nothing is asked of it."""
    closed_at: int | None
    cleaned_at: int | None
    """When what a closed one left in the store was removed."""


@dataclass(frozen=True)
class GradientOperation:
    """One step of a session. A session's operations are carried out in the order of their numbers."""

    id: str
    session_id: str
    tenant_id: str
    auxiliary_id: str
    number: int
    kind: GradientKind
    digest: str
    """Of what was asked, so that the same can be told from something else under the same number."""
    rows: int
    """Rows of text that a pass has to make for it."""
    request: dict[str, Any]
    """What was asked; empty once it is over."""
    status: GradientStatus
    holder: str | None
    """Who carries it out, or did so last."""
    attempt: int
    """How often it was begun."""
    version: int | None
    """Of the auxiliary after it, once it is over."""
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    """`{type, message, param, code}`"""
    created_at: int
    finished_at: int | None
    dropped_at: int | None
    """When its gradients were given up."""


@dataclass(frozen=True)
class GradientQueue:
    """What is before an operation."""

    ahead: int
    """Operations of all customers that came earlier and are not over."""
    rows: int
    """Rows of these together."""
    position: int
    """Place among the unfinished operations of its own session: 1 is carried out next, or just now."""


@dataclass(frozen=True)
class AuditLine:
    """Who did what to what, and how it ended."""

    seq: int
    at: int
    tenant_id: str | None
    key_id: str | None
    action: str
    target: str
    outcome: str
    detail: dict[str, Any]
    request_id: str | None


def record(kind: type[T], row: Mapping[Any, Any]) -> T:
    """A row as an object of its kind; columns that the kind does not have are left out."""
    assert dataclasses.is_dataclass(kind)
    return kind(**{field.name: row[field.name] for field in dataclasses.fields(kind)})
