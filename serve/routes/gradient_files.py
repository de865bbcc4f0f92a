"""Files of gradient learning: auxiliaries in and out, gradients and saved files out.

What is in them is inspected in gradient_uploads.py; operations are in gradient_operations.py."""

from __future__ import annotations

import hashlib
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from safetensors.torch import save

from ot_ray.cola import Auxiliary, AuxiliaryConfig
from ot_ray.errors import NotFoundError
from ot_ray.store import Store
from serve.catalogue.records import GradientAuxiliary, GradientKind, GradientOperation, GradientSession
from serve.failures import ApiError
from serve.routes import service_of
from serve.routes.downloads import Download, download
from serve.routes.gradient_operations import (
    ENDED,
    TAKEN,
    Number,
    digest_of,
    find_operation,
    refusals,
    session_gone,
    told,
)
from serve.routes.gradient_uploads import HEADER_ROOM, Received, converted, received, shapes_of, sites_of
from serve.routes.gradients import Asker, catalogue_of, find_session, gradients_of, kept_in
from serve.routes.identity import Identity, noted
from serve.routes.once import OnceRoute
from serve.routes.transfers import in_thread, turn
from serve.stored_gradients import gradients_key, saved_prefix, start_key, upload_key
from serve.wire.gradients import OperationObject
from serve.wire.paging import shown

router = APIRouter(prefix="/v1/cola/sessions/{session_id}", tags=["Gradient learning"], route_class=OnceRoute)

_PIECE = 4 * 2**20
_TRIES, _FLOAT_BYTES = 3, 4
_BYTES: dict[str, Any] = {"application/octet-stream": {}}
_DOWNLOAD: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": _BYTES},
    206: {"description": "The range asked for", "content": _BYTES},
    304: {"description": "The client has it already"},
    409: {"description": "It is not there yet, or will not be"},
    410: {"description": "It was removed"},
    416: {"description": "The range begins beyond the end"},
}
_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}}


@router.put(
    "/auxiliary",
    status_code=202,
    summary="Send a fitted auxiliary",
    openapi_extra=_BODY,
    responses=TAKEN,
)
async def put_auxiliary(
    request: Request,
    response: Response,
    session_id: str,
    identity: Asker,
    number: Annotated[int, Query(ge=0, le=2**31 - 1, description="Of the operation")],
    version: Annotated[int, Query(ge=0, le=2**53, description="Of the auxiliary that it was fitted from")],
) -> OperationObject:
    """Make tensors the session's auxiliary: safetensors with the names and shapes that its kind and its sites have, in
    float32, bfloat16 or float16. It is taken as an operation, between the passes before and after it."""
    files = service_of(request).settings.files
    with turn(request, identity.tenant_id, files.uploads):
        session = await in_thread(_awaiting, request, identity, session_id, number, version)
        shapes = shapes_of(session)
        most = _FLOAT_BYTES * sum(map(math.prod, shapes.values())) + HEADER_ROOM
        async with received(request, most, files.folder) as body:
            operation, is_new = await in_thread(_take, request, identity, session, number, version, body)
    if not is_new:
        response.status_code = 200
    return await in_thread(told, request, response, operation)


@router.head("/auxiliary", include_in_schema=False)
@router.get("/auxiliary", summary="Download the present auxiliary", response_class=Response, responses=_DOWNLOAD)
async def get_auxiliary(request: Request, session_id: str, identity: Asker) -> Response:
    """The auxiliary's tensors in float32, as safetensors; `x-cola-version` is their version."""
    session = await in_thread(_open_session, request, identity, session_id)
    for _ in range(_TRIES):
        auxiliary, item = await in_thread(_present, request, session)
        try:
            answer = await download(request, kept_in(request), item)
        except NotFoundError:
            continue  # two fits were made meanwhile
        answer.headers["x-cola-version"] = str(auxiliary.version)
        return answer
    raise ApiError("The auxiliary changes faster than it can be read; try again.", 503, "unavailable", retry_after_s=1)


@router.head("/gradients/{number}", include_in_schema=False)
@router.get("/gradients/{number}", summary="Download gradients", response_class=Response, responses=_DOWNLOAD)
async def get_gradients(request: Request, session_id: str, number: Number, identity: Asker) -> Response:
    """The inputs x and the gradients g at every site, as safetensors, until the pass after the next is made."""
    session = await in_thread(_open_session, request, identity, session_id)
    operation, result = await in_thread(_ended_well, request, session, number, "forward_backward")
    if session.settings["fit"] == "server":
        raise ApiError("The server fits this session; it hands no gradients out.", 404, "wrong_fit")
    if operation.dropped_at is not None:
        raise _gone(number)
    item = Download(
        gradients_key(operation), result["bytes"], result["sha256"], f"{session.id}-gradients-{number}.safetensors"
    )
    try:
        return await download(request, kept_in(request), item)
    except NotFoundError:
        raise _gone(number) from None


@router.head("/saved/{number}/files/{name}", include_in_schema=False)
@router.get(
    "/saved/{number}/files/{name}", summary="Download a saved file", response_class=Response, responses=_DOWNLOAD
)
async def get_saved(request: Request, session_id: str, number: Number, name: str, identity: Asker) -> Response:
    """One of the files that `save` made."""
    session = await in_thread(_open_session, request, identity, session_id)
    operation, result = await in_thread(_ended_well, request, session, number, "save")
    file = next((file for file in result["files"] if file["name"] == name), None)
    if file is None:
        raise ApiError(f"Operation {number} saved no file {shown(name)}.", 404, param="name")
    item = Download(f"{saved_prefix(operation)}/{name}", file["bytes"], file["sha256"], name)
    return await download(request, kept_in(request), item)


def _awaiting(request: Request, identity: Identity, session_id: str, number: int, version: int) -> GradientSession:
    """The session, if it would take the upload in; known before any of it is read."""
    session = find_session(request, identity, session_id)
    most = gradients_of(request).queued_operations
    with refusals(session, number):
        catalogue_of(request).gradient_operations.check(session, number, most, version)
    return session


def _take(
    request: Request, identity: Identity, session: GradientSession, number: int, version: int, body: Received
) -> tuple[GradientOperation, bool]:
    operations, most = catalogue_of(request).gradient_operations, gradients_of(request).queued_operations
    key = upload_key(session, number, body.sha256)
    if number >= session.next_number:
        with tempfile.TemporaryDirectory(dir=service_of(request).settings.files.folder) as folder:
            target = Path(folder) / "auxiliary.safetensors"
            converted(body.path, shapes_of(session), target)
            kept_in(request).upload(target, key)
    digest = digest_of("load", {"sha256": body.sha256, "version": version})
    line = noted(request, identity, "cola.load", number=number, version=version)
    with refusals(session, number):
        return operations.submit(
            session, "load", number, digest, {"key": key, "version": version}, most, version=version, audit=line
        )


def _open_session(request: Request, identity: Identity, session_id: str) -> GradientSession:
    session = find_session(request, identity, session_id)
    if session.status != "open":
        raise session_gone(session)
    return session


def _ended_well(
    request: Request, session: GradientSession, number: int, kind: GradientKind
) -> tuple[GradientOperation, dict[str, Any]]:
    operation = find_operation(request, session, number)
    if operation.kind != kind:
        raise ApiError(f"Operation {number} is a {operation.kind}, no {kind}.", 404, param="number")
    if operation.status not in ENDED:
        raise ApiError(f"Operation {number} is not over yet; wait for it.", 409, "not_ready", retry_after_s=1)
    if operation.result is None:
        raise ApiError(f"Operation {number} failed, so that there is nothing to download.", 409, "operation_failed")
    return operation, operation.result


def _gone(number: int) -> ApiError:
    return ApiError(
        f"The gradients of operation {number} are removed; they last until the pass after the next is made.",
        410,
        "gradients_gone",
        "number",
    )


def _present(request: Request, session: GradientSession) -> tuple[GradientAuxiliary, Download]:
    store = kept_in(request)
    auxiliary = catalogue_of(request).gradient_sessions.auxiliary(session.auxiliary_id)
    key = auxiliary.key
    if key is None:
        key = start_key(auxiliary)
        if not store.exists(key):
            config = AuxiliaryConfig.model_validate(session.settings["auxiliary"])
            store.write(key, save(Auxiliary(sites_of(session), config).tensors))
    size, sha256 = _sum(store, key)
    return auxiliary, Download(key, size, sha256, f"{session.id}-auxiliary.safetensors")


def _sum(store: Store, key: str) -> tuple[int, str]:
    """Bytes and sha256 of an object, which is read if the store does not know."""
    info = store.info(key)
    if info.sha256 is not None:
        return info.size, info.sha256
    digest = hashlib.sha256()
    for start in range(0, info.size, _PIECE):
        digest.update(store.read_range(key, start, start + _PIECE))
    return info.size, digest.hexdigest()
