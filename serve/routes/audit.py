"""`/v1/audit`: the audit log for the operator, in pages or as JSON lines.

Lines are written by `record` in identity.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response, StreamingResponse

from ot_ray.errors import NotFoundError
from serve.catalogue.records import AuditLine
from serve.routes import service_of
from serve.routes.identity import Identity, needs
from serve.wire.audit import AuditEntry
from serve.wire.paging import After, Limit, Listing, unknown_cursor

router = APIRouter(prefix="/v1", tags=["Admin"])

_JSON_LINES = "application/jsonl"
_Filter = Annotated[str | None, Query(max_length=128)]


@router.get(
    "/audit",
    response_model=Listing[AuditEntry],
    responses={200: {"content": {_JSON_LINES: {"schema": {"type": "string"}}}}},
    summary="List audit log entries",
)
def list_audit(
    request: Request,
    identity: Annotated[Identity, Depends(needs("admin"))],
    after: After = None,
    limit: Limit = 20,
    tenant_id: _Filter = None,
    action: _Filter = None,
    format: Annotated[Literal["json", "jsonl"] | None, Query(description="jsonl: every line at once")] = None,
) -> Response | Listing[AuditEntry]:
    """The newest lines; with `format=jsonl` or `accept: application/jsonl` all of them, the oldest first."""
    catalogue = service_of(request).catalogue
    assert catalogue is not None
    if format == "jsonl" or (format is None and _JSON_LINES in request.headers.get("accept", "")):
        return StreamingResponse(catalogue.audit.json_lines(tenant_id=tenant_id, action=action), media_type=_JSON_LINES)
    try:
        number = None if after is None else _number(after)
        page = catalogue.audit.list(tenant_id=tenant_id, action=action, after=number, limit=limit)
    except NotFoundError:
        raise unknown_cursor("audit entry", after) from None
    return Listing[AuditEntry].of([_entry(line) for line in page.items], page.has_more)


def _entry(line: AuditLine) -> AuditEntry:
    values = asdict(line)
    return AuditEntry(id=str(values.pop("seq")), **values)


def _number(after: str) -> int:
    if not (after.isascii() and after.isdecimal() and len(after) <= 18):
        raise NotFoundError(after)
    return int(after)
