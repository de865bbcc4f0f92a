"""Tenants and keys as types: what an operator asks for, and the shape of the answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from serve.wire.base import Request, at_most

KeyScope = Literal["files", "jobs", "inference", "offsite", "cola", "admin"]


class Limits(Request):
    """Limits to change; those that are left out stay."""

    running_jobs: int | None = Field(default=None, ge=0, le=2**31)
    queued_jobs: int | None = Field(default=None, ge=0, le=2**31)
    tokens_per_day: int | None = Field(default=None, ge=0, le=2**62)
    requests_per_minute: int | None = Field(default=None, ge=0, le=2**31)
    file_bytes: int | None = Field(default=None, ge=0, le=2**62)


class TenantRequest(Request):
    """The body of `POST /v1/admin/tenants`."""

    name: str
    limits: Limits = Limits()


class TenantChange(Request):
    """The body of `POST /v1/admin/tenants/{id}`."""

    limits: Limits = Limits()
    disabled: bool | None = None
    """True refuses every key of the tenant, False takes them again."""


class KeyRequest(Request):
    """The body of `POST /v1/admin/keys`."""

    tenant_id: str
    name: str = Field(default="", max_length=64)
    scopes: Annotated[list[KeyScope], at_most(6)] = Field(min_length=1, max_length=6)
    expires_days: int | None = Field(default=None, ge=1, le=36500)
    """Days after which it is refused; null for no end."""


class RotateRequest(Request):
    """The body of `POST /v1/admin/keys/{id}/rotate`."""

    overlap_seconds: int = Field(default=24 * 3600, ge=0, le=30 * 24 * 3600)
    """How long the old secret is still taken."""


class TenantCard(BaseModel):
    """A tenant."""

    object: Literal["tenant"] = "tenant"
    id: str
    name: str
    created_at: int
    disabled_at: int | None
    limits: dict[str, int]


class KeyCard(BaseModel):
    """A key without its secret."""

    object: Literal["api_key"] = "api_key"
    id: str
    tenant_id: str
    name: str
    hint: str
    """The secret's last four characters."""
    scopes: list[str]
    created_at: int
    expires_at: int | None
    revoked_at: int | None


class NewKeyCard(KeyCard):
    """A key that was just made."""

    secret: str | None
    """Shown this once; null when the answer is replayed."""
