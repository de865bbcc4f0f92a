"""`/v1/offsite/adapters`: adapters that customers tuned at home, sent in pieces and inspected behind the scenes.

How pieces become files is in pieces.py; the verdict is the controller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ot_ray.artifacts.manifest import now
from ot_ray.errors import NotFoundError, OTRayError
from serve.catalogue import Catalogue, new_id
from serve.catalogue.records import Adapter
from serve.failures import ApiError
from serve.routes import service_of
from serve.routes.identity import Identity, needs, noted
from serve.routes.offsite import find_offer, store_of
from serve.routes.once import OnceRoute, once_of
from serve.routes.piece_bodies import OffsetError, body_of, placed
from serve.routes.pieces import Receiving, upload_prefix
from serve.routes.transfers import in_thread, turn
from serve.service import Service
from serve.wire.offsite import (
    SMALLEST_PIECE,
    AdapterDeleted,
    AdapterObject,
    AdapterRequest,
    OffsiteConfig,
    ReceivedFile,
)
from serve.wire.paging import After, Limit, Listing, shown, unknown_cursor

router = APIRouter(prefix="/v1/offsite/adapters", tags=["Offsite"], route_class=OnceRoute)

Asker = Annotated[Identity, Depends(needs("offsite"))]
_ALONE_S = 60
_PIECE_BODY = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}},
    "parameters": [
        {
            "name": "content-range",
            "in": "header",
            "required": False,
            "description": "`bytes first-last/total`; without it, the body is the whole file",
            "schema": {"type": "string"},
        }
    ],
}


@router.post("", summary="Announce an adapter")
def create_adapter(request: Request, body: AdapterRequest, identity: Asker) -> AdapterObject:
    """Say which files will be sent; then send each with PUT, and complete the upload."""
    service = service_of(request)
    catalogue, settings = _catalogue(service), _settings(service)
    bundle = find_offer(service, body.bundle_id).manifest
    if bundle.expires is not None and bundle.expires <= now():
        raise ApiError(
            f"Bundle {bundle.bundle_id} expired at {bundle.expires.isoformat()}; tune a newer one.",
            code="bundle_expired",
            param="bundle_id",
        )
    size = sum(file.bytes for file in body.files)
    if size > settings.limits.max_bytes:
        raise ApiError(
            f"The files have {size} bytes together; at most {settings.limits.max_bytes} are taken.", 413, param="files"
        )
    adapter = catalogue.adapters.create(
        identity.tenant_id,
        bundle={"model": bundle.model, "version": bundle.version, "bundle_id": bundle.bundle_id},
        suffix=body.suffix,
        files=[file.model_dump() for file in body.files],
        bytes=size,
        adapter_id=once_of(request).new_id("adp_"),
        most_open=settings.open_uploads,
        audit=noted(request, identity, "adapter.create", bundle_id=bundle.bundle_id, suffix=body.suffix),
    )
    if adapter is None:
        raise ApiError(
            f"{settings.open_uploads} uploads have no verdict yet; finish or delete one, or wait.",
            429,
            "rate_limit_exceeded",
            retry_after_s=30,
        )
    return adapter_object(service, adapter, _receiving(service, adapter))


@router.get("", summary="List adapters")
def list_adapters(request: Request, identity: Asker, after: After = None, limit: Limit = 20) -> Listing[AdapterObject]:
    """The asker's uploads, the newest first; how far each is, is told of one alone."""
    service = service_of(request)
    try:
        page = _catalogue(service).adapters.list(identity.tenant_id, after=after, limit=limit)
    except NotFoundError:
        raise unknown_cursor("adapter", after) from None
    return Listing.of([adapter_object(service, adapter) for adapter in page.items], page.has_more)


@router.get("/{adapter_id}", summary="Retrieve an adapter")
def get_adapter(request: Request, adapter_id: str, identity: Asker) -> AdapterObject:
    """How far an upload is, or its verdict with every reason."""
    service = service_of(request)
    adapter = _adapter(_catalogue(service), identity, adapter_id)
    return adapter_object(service, adapter, _receiving(service, adapter))


@router.delete("/{adapter_id}", summary="Delete an upload")
def delete_adapter(request: Request, adapter_id: str, identity: Asker) -> AdapterDeleted:
    """Take back an upload that is not inspected yet, or drop a rejected one."""
    service = service_of(request)
    catalogue = _catalogue(service)
    adapter = _adapter(catalogue, identity, adapter_id)
    line = noted(request, identity, "adapter.delete")
    if not catalogue.adapters.delete(adapter.id, {"receiving", "received", "rejected"}, line):
        raise ApiError(
            f"Adapter {adapter.id} is being inspected or accepted; delete its model instead.", 409, "invalid_state"
        )
    store_of(service).delete_prefix(upload_prefix(adapter.id))
    return AdapterDeleted(id=adapter.id)


@router.head("/{adapter_id}/files/{name}", include_in_schema=False)
def get_offset(request: Request, adapter_id: str, name: str, identity: Asker) -> Response:
    """How far a file is: `upload-offset` of `upload-length` bytes."""
    service = service_of(request)
    _, receiving = _open(service, identity, adapter_id, name)
    offset, length = receiving.received(name), receiving.files[name].bytes
    return Response(headers={"upload-offset": str(offset), "upload-length": str(length)})


@router.put(
    "/{adapter_id}/files/{name}",
    summary="Send a file, or the next piece of it",
    openapi_extra=_PIECE_BODY,
    responses={409: {"description": "The piece does not begin where the file ends so far; `upload-offset` says where"}},
)
async def put_piece(request: Request, adapter_id: str, name: str, identity: Asker) -> AdapterObject:
    """Bytes of one file, in order. What came before a cut is kept: ask how far the file is, and go on from there."""
    service = service_of(request)
    with turn(request, identity.tenant_id, service.settings.files.uploads):
        adapter, receiving = await in_thread(_open, service, identity, adapter_id, name)
        total = receiving.files[name].bytes
        piece = placed(request.headers, total, _settings(service).piece_bytes)
        await in_thread(_require_offset, receiving, name, piece.start)
        async with body_of(request, piece, service.settings.files.folder) as (path, came, broken):
            if came and (piece.start + came == total or came >= SMALLEST_PIECE):
                await in_thread(_keep, service, adapter, receiving, name, piece.start, path)
        if broken is not None:
            raise broken
        return await in_thread(adapter_object, service, adapter, receiving)


@router.post("/{adapter_id}/complete", summary="Complete an upload")
async def complete_adapter(request: Request, adapter_id: str, identity: Asker) -> AdapterObject:
    """All files are sent: check their hashes, and have the adapter inspected."""
    return await in_thread(_complete, request, adapter_id, identity)


def _complete(request: Request, adapter_id: str, identity: Identity) -> AdapterObject:
    service = service_of(request)
    catalogue = _catalogue(service)
    adapter = _adapter(catalogue, identity, adapter_id)
    if adapter.state != "receiving":
        return adapter_object(service, adapter)
    receiving = _receiving(service, adapter)
    missing = {
        name: size for name in receiving.files if (size := receiving.received(name)) < receiving.files[name].bytes
    }
    if missing:
        told = ", ".join(f"{name} has {size} of {receiving.files[name].bytes} bytes" for name, size in missing.items())
        raise ApiError(f"The upload is not complete: {told}.", 409, "incomplete")
    catalogue.adapters.touch(adapter.id)
    _assemble(service, adapter, receiving)
    line = noted(request, identity, "adapter.complete")
    moved = catalogue.adapters.move(adapter.id, {"receiving"}, "received", audit=line)
    if moved is not None:
        # Pieces that came meanwhile: those that come from now on see the new state, and remove themselves.
        receiving.forget_pieces()
    else:
        moved = _still_there(service, adapter)
    return adapter_object(service, moved)


def adapter_object(service: Service, adapter: Adapter, receiving: Receiving | None = None) -> AdapterObject:
    """An upload as clients see it.

    Args:
        receiving: to tell how far each file is.
    """
    counted = receiving if adapter.state == "receiving" else None
    return AdapterObject(
        id=adapter.id,
        bundle_id=adapter.bundle["bundle_id"],
        suffix=adapter.suffix,
        state=adapter.state,
        reasons=adapter.reasons,
        report=adapter.report,
        model_id=adapter.model_id,
        bytes=adapter.bytes,
        files=[
            ReceivedFile(**file, received=counted.received(file["name"]) if counted else None) for file in adapter.files
        ],
        piece_bytes=_settings(service).piece_bytes,
        created_at=adapter.created_at,
        finished_at=adapter.finished_at,
    )


def _assemble(service: Service, adapter: Adapter, receiving: Receiving) -> None:
    problems = []
    try:
        for name in receiving.files:
            with _alone(service, f"adapter {adapter.id}"):
                if _still_there(service, adapter).state != "receiving":
                    raise _in_use()
                problems.append(receiving.assemble(name))
    except NotFoundError:
        # Another request completes or deletes it at this very moment.
        raise _in_use() from None
    if told := "; ".join(problem for problem in problems if problem):
        raise ApiError(f"The upload is damaged: {told}.", 409, "wrong_sha256")


def _keep(service: Service, adapter: Adapter, receiving: Receiving, name: str, start: int, path: Path) -> None:
    with _alone(service, f"adapter {adapter.id} {name}"):
        # Pieces that came at the same time would be kept beside each other, without end.
        _require_offset(receiving, name, start)
        receiving.add(name, start, path)
    _catalogue(service).adapters.touch(adapter.id)
    if _still_there(service, adapter).state != "receiving":
        receiving.forget_pieces()


def _require_offset(receiving: Receiving, name: str, start: int) -> None:
    offset = receiving.received(name)
    if start != offset:
        raise OffsetError(name, offset)


@contextmanager
def _alone(service: Service, name: str) -> Iterator[None]:
    """The one request of all replicas that works on something; 409 to others, for a minute if this one dies."""
    leases, holder = _catalogue(service).leases, new_id("request-")
    if not leases.take(name, holder, _ALONE_S):
        raise _in_use()
    try:
        yield
    finally:
        with suppress(OTRayError):  # it ends by itself
            leases.release(name, holder)


def _in_use() -> ApiError:
    return ApiError("Another request works on this upload; try again.", 409, "upload_in_use", retry_after_s=1)


def _still_there(service: Service, adapter: Adapter) -> Adapter:
    """The upload as it is now; of one that was deleted while bytes of it were written, nothing is left behind."""
    try:
        return _catalogue(service).adapters.get(adapter.tenant_id, adapter.id)
    except NotFoundError:
        store_of(service).delete_prefix(upload_prefix(adapter.id))
        raise ApiError(f"No such adapter: {shown(adapter.id)}", 404, param="adapter_id") from None


def _open(service: Service, identity: Identity, adapter_id: str, name: str) -> tuple[Adapter, Receiving]:
    """An upload that still takes this file."""
    adapter = _adapter(_catalogue(service), identity, adapter_id)
    receiving = _receiving(service, adapter)
    if name not in receiving.files:
        raise ApiError(f"Adapter {adapter.id} announced no file {shown(name)}.", 404, param="name")
    if adapter.state != "receiving":
        raise ApiError(f"Adapter {adapter.id} is {adapter.state} and takes no more bytes.", 409, "invalid_state")
    return adapter, receiving


def _receiving(service: Service, adapter: Adapter) -> Receiving:
    return Receiving(store_of(service), adapter.id, adapter.files, service.settings.files.folder)


def _adapter(catalogue: Catalogue, identity: Identity, adapter_id: str) -> Adapter:
    try:
        return catalogue.adapters.get(identity.tenant_id, adapter_id)
    except NotFoundError:
        raise ApiError(f"No such adapter: {shown(adapter_id)}", 404, param="adapter_id") from None


def _catalogue(service: Service) -> Catalogue:
    assert service.catalogue is not None, "offsite routes need a database"
    return service.catalogue


def _settings(service: Service) -> OffsiteConfig:
    return service.settings.offsite
