"""`Idempotency-Key`: the same POST again is answered as before and has no second effect.

A router opts in by `APIRouter(route_class=OnceRoute)`. Only answers of 2xx are remembered, for a day; a request that
was refused at its first try had no effect, and its key is free again. Streams are not remembered."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve.catalogue import Catalogue, new_id
from serve.catalogue.idempotency import Answered, Begun, Busy, Reused
from serve.catalogue.records import Scope
from serve.failures import ApiError, DatabaseUnavailableError
from serve.routes import service_of
from serve.routes.identity import Identity, authorize, identify, scope_of

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_MOST_BYTES = 2**20
_LONGEST_WAIT_S = 5
# Several within the minute after which a request counts as dead.
_BEAT_S = 15.0
_log = logging.getLogger(__name__)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Once:
    """One POST that is being carried out; without a key it remembers nothing.

    Within `held`, the database is told again and again that it is. A server that dies in the middle leaves the request
    unsettled: for a minute it is answered 409, then the next try carries it out. What that try makes under `new_id` is
    what the first one made, if it got so far, or makes if it is not dead but was cut off from the database."""

    def __init__(self, catalogue: Catalogue | None = None, tenant_id: str = "", key: str = "") -> None:
        self._catalogue, self._tenant_id, self._key = catalogue, tenant_id, key
        self._begun: Begun | None = None
        self._hidden: tuple[str, ...] = ()
        self.replay: Response | None = None
        """The answer to give at once, because the request was carried out before."""

    def new_id(self, prefix: str) -> str:
        """An id for what the request makes, the same at each try under one key; one of a kind for each prefix."""
        if self._begun is None:
            return new_id(prefix)
        return prefix + hashlib.sha256(f"{prefix} {self._begun.nonce}".encode()).hexdigest()[:24]

    def new_bytes(self, purpose: str) -> bytes:
        """32 bytes nobody can guess, the same at each try under one key; others for each purpose."""
        if self._begun is None:
            return secrets.token_bytes(32)
        return hashlib.sha256(f"bytes {purpose} {self._begun.nonce}".encode()).digest()

    @property
    def may_be_known(self) -> bool:
        """Whether the request came with a key, so that it may have been carried out before."""
        return self._catalogue is not None

    @property
    def taken_over(self) -> bool:
        """Whether an earlier try under the key may have had its effect."""
        return self._begun is not None and self._begun.taken_over

    def hide(self, *fields: str) -> None:
        """Leave fields of the answer out of what is remembered: a replay has null in their place."""
        self._hidden = fields

    def begin(self, fingerprint: str) -> None:
        """Take the request on, or set `replay`.

        Raises:
            ApiError: 409 while another carries it out, 422 if the key belongs to another request.
        """
        if self._catalogue is None:
            return
        found = self._catalogue.idempotency.begin(self._tenant_id, self._key, fingerprint)
        if isinstance(found, Begun):
            self._begun = found
        elif isinstance(found, Answered):
            self.replay = Response(
                found.body, found.status, {"idempotency-replayed": "true"}, media_type="application/json"
            )
        else:
            raise _refused(found)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keep others from taking the request over during the block, however long it takes."""
        beats = asyncio.create_task(self._beat()) if self._catalogue is not None else None
        try:
            yield
        finally:
            if beats is not None:
                beats.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                await anyio.to_thread.run_sync(self._hold)
            except DatabaseUnavailableError as error:
                _log.warning("a request cannot be held on to: %s", error)

    def _hold(self) -> None:
        if self._catalogue is not None and self._begun is not None:
            self._catalogue.idempotency.hold(self._tenant_id, self._key, self._begun.holder)

    def finish(self, status: int, body: bytes) -> None:
        """The request was answered: remember a success, and free the key after a refusal of the first try.

        A later try that is refused keeps it, because the first may have had its effect all the same."""
        if self._catalogue is None or self._begun is None:
            return
        rows, place = self._catalogue.idempotency, (self._tenant_id, self._key, self._begun.holder)
        if 200 <= status < 300 and len(body) <= _MOST_BYTES:
            rows.finish(*place, status, _without(body, self._hidden))
        elif status >= 500 or self.taken_over:
            rows.leave(*place)
        else:
            rows.forget(*place)

    def failed(self, error: BaseException) -> None:
        """The request ended in an error: one that refused it frees the key, any other leaves it to the next try."""
        self.finish(_status(error), b"")


def once_for(request: Request, identity: Identity) -> Once:
    """A POST by its `Idempotency-Key`, for routes that take their body as a stream and call `begin` themselves.

    Raises:
        ApiError: 400 if the key is none.
    """
    key = request.headers.get("idempotency-key")
    catalogue = service_of(request).catalogue
    if key is None or catalogue is None:
        return Once()
    if not _KEY.fullmatch(key):
        raise ApiError(
            "Idempotency-Key must be 1 to 255 printable ASCII characters without blanks; send a UUID.",
            code="invalid_idempotency_key",
        )
    return Once(catalogue, identity.tenant_id, key)


def once_of(request: Request) -> Once:
    """The POST that a route of an `OnceRoute` router carries out."""
    return getattr(request.state, "once", None) or Once()


class OnceRoute(APIRoute):
    """A route whose POSTs obey `Idempotency-Key`; their bodies are read whole, once it is known who asks and that
    they may."""

    def get_route_handler(self) -> Handler:
        """The handler that FastAPI calls."""
        handle = super().get_route_handler()
        scope = _scope_of(self.dependant)

        async def carried_out_once(request: Request) -> Response:
            if scope is not None:
                await anyio.to_thread.run_sync(authorize, request, scope)
            if request.method != "POST" or "idempotency-key" not in request.headers:
                return await handle(request)
            return await _once(request, handle)

        return carried_out_once


def _scope_of(route: Dependant) -> Scope | None:
    """The scope that a route's keys must have; None if it asks for no key."""
    for dependency in route.dependencies:
        scope = scope_of(dependency.call) or _scope_of(dependency)
        if scope is not None:
            return scope
    return None


async def _once(request: Request, handle: Handler) -> Response:
    identity = await anyio.to_thread.run_sync(identify, request)
    once = request.state.once = once_for(request, identity)
    await anyio.to_thread.run_sync(once.begin, _fingerprint(request, await request.body()))
    if once.replay is not None:
        return once.replay
    try:
        async with once.held():
            response = await handle(request)
    except (Exception, anyio.get_cancelled_exc_class()) as error:
        # Also when the client has gone: its next try need not wait until this one counts as dead.
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(once.failed, error)
        raise
    body = getattr(response, "body", None)
    status, told = (400, b"") if body is None else (response.status_code, bytes(body))  # no body: a stream
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(once.finish, status, told)
    return response


def _fingerprint(request: Request, body: bytes) -> str:
    place = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
    return hashlib.sha256(place + body).hexdigest()


def _refused(found: Busy | Reused) -> ApiError:
    if isinstance(found, Reused):
        return ApiError(
            "This Idempotency-Key was used for another request; send a new one.", 422, "idempotency_key_reused"
        )
    return ApiError(
        "A request with this Idempotency-Key is being carried out; try again.",
        409,
        "idempotency_key_in_use",
        retry_after_s=min(found.seconds, _LONGEST_WAIT_S),
    )


def _status(error: BaseException) -> int:
    if isinstance(error, RequestValidationError):
        return 400
    if isinstance(error, HTTPException):
        return error.status_code
    return error.status if isinstance(error, ApiError) else 500


def _without(body: bytes, fields: tuple[str, ...]) -> str:
    text = body.decode()
    return json.dumps({**json.loads(text), **dict.fromkeys(fields)}) if fields else text
