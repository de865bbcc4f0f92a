"""`/v1/files`: what customers upload for tuning, and what jobs leave for them.

Reading a form is uploads.py's, sending bytes downloads.py's; row and bytes are kept together by stored_files.py."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from ot_ray.errors import NotFoundError
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.catalogue.records import File
from serve.failures import ApiError
from serve.routes import service_of
from serve.routes.downloads import Download, download
from serve.routes.identity import Identity, needs, noted
from serve.routes.once import Once, once_for
from serve.routes.transfers import in_thread, turn
from serve.routes.uploads import ROOM, Form, received_form
from serve.stored_files import TenantFullError, drop_file, file_key, keep_file
from serve.wire.files import HOUR_S, MONTH_S, FileDeleted, FileForm, FileObject
from serve.wire.paging import After, Listing, shown, unknown_cursor

router = APIRouter(prefix="/v1/files", tags=["Files"])

Asker = Annotated[Identity, Depends(needs("files"))]
_INDEXED = re.compile(r"(\w{1,64})\[(\w{1,64})\]")
_WHOLE = re.compile(r"[0-9]{1,12}")
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON lines"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": HOUR_S, "maximum": MONTH_S},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post("", response_model=FileObject, openapi_extra=_FORM, summary="Upload a file")
async def create_file(request: Request, identity: Asker) -> Response:
    """Keep a file for tuning. It is streamed to the store, and is there whole or not at all."""
    settings = service_of(request).settings.files
    once = once_for(request, identity)
    with turn(request, identity.tenant_id, settings.uploads):
        if not once.may_be_known:  # a file that is kept already needs no more room
            await to_thread.run_sync(_require_room, request, identity)
        async with received_form(request, settings.max_bytes, settings.folder) as form, once.held():
            return await in_thread(_create, request, identity, form, once)


@router.get("", summary="List files")
def list_files(
    request: Request,
    identity: Asker,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Listing[FileObject]:
    """The asker's files, the newest first."""
    catalogue, _ = _kept_in(request)
    try:
        page = catalogue.files.list(identity.tenant_id, after=after, limit=limit, order=order, purpose=purpose)
    except NotFoundError:
        raise unknown_cursor("file", after) from None
    return Listing[FileObject].of([file_object(file) for file in page.items], page.has_more)


@router.get("/{file_id}", summary="Retrieve a file")
def get_file(request: Request, file_id: str, identity: Asker) -> FileObject:
    """One file of the asker's."""
    return file_object(_file(request, identity, file_id))


@router.delete("/{file_id}", summary="Delete a file")
def delete_file(request: Request, file_id: str, identity: Asker) -> FileDeleted:
    """Delete a file. Jobs that were made with it have read it or fail; those that run have copies of their own."""
    catalogue, store = _kept_in(request)
    with _not_found(file_id):
        file = drop_file(catalogue, store, identity.tenant_id, file_id, noted(request, identity, "file.delete"))
    return FileDeleted(id=file.id)


@router.head("/{file_id}/content", include_in_schema=False)
@router.get("/{file_id}/content", summary="Retrieve a file's content", response_class=Response)
async def get_content(request: Request, file_id: str, identity: Asker) -> Response:
    """The bytes of a file, as they were sent; single ranges are served."""
    file = await to_thread.run_sync(_file, request, identity, file_id)
    _, store = _kept_in(request)
    with _not_found(file_id):
        item = Download(file_key(file.tenant_id, file.id), file.bytes, file.sha256, file.filename)
        return await download(request, store, item)


def file_object(file: File) -> FileObject:
    """A row as OpenAI shows it."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
        status_details=file.status_details,
    )


def _create(request: Request, identity: Identity, form: Form, once: Once) -> Response:
    wanted = _parsed(form)
    once.begin(_fingerprint(form))
    if once.replay is not None:
        return once.replay
    try:
        file = _keep(request, identity, form, wanted, once)
    except Exception as error:
        once.failed(error)
        raise
    answer = JSONResponse(file_object(file).model_dump())
    once.finish(answer.status_code, bytes(answer.body))
    return answer


def _keep(request: Request, identity: Identity, form: Form, wanted: FileForm, once: Once) -> File:
    catalogue, store = _kept_in(request)
    try:
        return keep_file(
            catalogue,
            store,
            form.file.path,
            tenant_id=identity.tenant_id,
            filename=form.file.filename,
            purpose=wanted.purpose,
            size=form.file.size,
            sha256=form.file.sha256,
            lasts_s=wanted.expires_after.seconds if wanted.expires_after else None,
            most_bytes=identity.limits.file_bytes,
            file_id=once.new_id("file-"),
            audit=noted(request, identity, "file.create", bytes=form.file.size),
        )
    except TenantFullError:
        raise _no_room(identity) from None


def _parsed(form: Form) -> FileForm:
    """The fields as types; `a[b]` is field b of a."""
    values: dict[str, Any] = {}
    for name, text in form.fields.items():
        value = int(text) if _WHOLE.fullmatch(text) else text
        indexed = _INDEXED.fullmatch(name)
        if indexed and isinstance(values.setdefault(indexed[1], {}), dict):
            values[indexed[1]][indexed[2]] = value
        elif not indexed:
            values[name] = value
    try:
        return FileForm.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None


def _fingerprint(form: Form) -> str:
    said = [sorted(form.fields.items()), form.file.filename, form.file.sha256]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _require_room(request: Request, identity: Identity) -> None:
    """Refuse a file that cannot fit before it is read; the last word is had when it is kept."""
    stated = request.headers.get("content-length", "0")
    kept = _kept_in(request)[0].files.kept_bytes(identity.tenant_id)
    if kept + int(stated) - ROOM > identity.limits.file_bytes:
        raise _no_room(identity)


def _no_room(identity: Identity) -> ApiError:
    return ApiError(
        f"The file does not fit: at most {identity.limits.file_bytes} bytes are kept in all. Delete files first.",
        400,
        "storage_limit_exceeded",
        "file",
    )


def _file(request: Request, identity: Identity, file_id: str) -> File:
    with _not_found(file_id):
        return _kept_in(request)[0].files.get(identity.tenant_id, file_id)


@contextmanager
def _not_found(file_id: str) -> Iterator[None]:
    try:
        yield
    except NotFoundError:
        raise ApiError(f"No such File object: {shown(file_id)}", 404, param="id") from None


def _kept_in(request: Request) -> tuple[Catalogue, Store]:
    service = service_of(request)
    assert service.catalogue is not None and service.store is not None
    return service.catalogue, service.store
