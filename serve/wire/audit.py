"""The audit log as types."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class AuditEntry(BaseModel):
    """Who did what to what, and how it ended."""

    object: Literal["audit.entry"] = "audit.entry"
    id: str
    """The number of the line; pass it as `after` for what came before it."""
    at: int
    """Seconds since 1970."""
    tenant_id: str | None
    key_id: str | None
    """None for a command of the operator's."""
    action: str
    target: str
    outcome: str
    detail: dict[str, Any]
    request_id: str | None
