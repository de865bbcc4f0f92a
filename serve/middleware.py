"""What surrounds every request whatever its route: an id, a last resort for errors, and limits on headers and bodies.

Errors that a route knows are told in api.py; what a body means is left to the routes."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import anyio
from pydantic import Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ot_ray.config import Config
from serve.failures import ApiError, api_error

_log = logging.getLogger(__name__)
TAKEN = "ot_ray.body.taken"
"""ASGI extension, and type of the message it stands for: a server that offers it wants to hear of every
`scope["extensions"][TAKEN]["every"]` bytes of the body that were taken, in a message's `bytes`."""
MOST_HEADER_BYTES = 32 * 1024
"""Bytes of headers and query in all."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LENGTH = re.compile(r"[0-9]{1,15}")
_MOST_HEADERS = 128


def request_id_of(scope: Scope) -> str:
    """The id that a request came with, if it is one plain name; else a new one."""
    given = ",".join(Headers(scope=scope).getlist("x-request-id"))
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"


def check_headers(scope: Scope) -> None:
    """Raises ApiError if a request has more headers than are taken."""
    size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("query_string", b""))
    if size > MOST_HEADER_BYTES or len(scope["headers"]) > _MOST_HEADERS:
        raise ApiError(
            f"The headers and the query take {size} bytes in {len(scope['headers'])} headers; "
            f"send at most {MOST_HEADER_BYTES} bytes in {_MOST_HEADERS}.",
            431,
        )


async def refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with an error that no route told."""
    failure = api_error(error)
    await JSONResponse(failure.body, failure.status, failure.headers)(scope, receive, send)


class RequestId:
    """Gives every request an id, the client's own if it sent a plain one, and logs what nobody caught by it.

    Args:
        answer: put the id on the answer as `x-request-id`.
    """

    def __init__(self, app: ASGIApp, answer: bool = True) -> None:
        self._app, self._answer = app, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if self._answer:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.exception("request %s failed", request_id)
            if begun:
                raise
            await refuse(error, scope, receive, send_with_id)


class Patience(Config):
    """How long a body may take to come."""

    idle_s: float = Field(default=30.0, gt=0)
    """Seconds to wait for the next piece."""
    grace_s: float = Field(default=60.0, ge=0)
    """Seconds to wait for all pieces together, beyond what `bytes_per_s` allows the body that has come."""
    bytes_per_s: int = Field(default=8192, ge=1)
    """Slowest rate that is taken, in bytes a second."""


@dataclass(frozen=True)
class Upload:
    """Requests whose bodies are streamed and may be larger than others."""

    method: str
    path: re.Pattern[str]
    """Matches the whole path."""
    most: int
    """Bytes of a body."""


class BodyLimit:
    """Refuses headers and bodies that are too large, bodies that come too slowly, and false lengths.

    Args:
        limit: bytes of a body.
        uploads: requests with limits of their own; the first that fits counts.
        patience: how long a body may take.
    """

    def __init__(
        self, app: ASGIApp, limit: int, uploads: Sequence[Upload] = (), patience: Patience | None = None
    ) -> None:
        self._app, self._limit, self._uploads, self._patience = app, limit, uploads, patience or Patience()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["method"], scope["path"])
        try:
            stated = _stated_length(scope, limit)
        except ApiError as failure:
            await refuse(failure, scope, receive, send)
            return
        tell = _Taken(scope, send)
        await self._app(scope, _Body(receive, limit, stated, self._patience, tell), send)

    def _limit_of(self, method: str, path: str) -> int:
        fitting = (item.most for item in self._uploads if item.method == method and item.path.fullmatch(path))
        return next(fitting, self._limit)


def _stated_length(scope: Scope, limit: int) -> int | None:
    """The content-length, if there is one. Raises ApiError if the headers show that the request is refused."""
    check_headers(scope)
    headers = Headers(scope=scope)
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ApiError("Compressed request bodies are not taken; send the body without content-encoding.", 415)
    stated = set(headers.getlist("content-length"))
    if not stated:
        return None
    if len(stated) > 1 or not _LENGTH.fullmatch(length := stated.pop()):
        raise ApiError("The header content-length is no number of bytes; send one whole number.")
    if int(length) > limit:
        raise ApiError(_too_large(limit), 413)
    return int(length)


class _Taken:
    """Tells the server how much of a body was taken, if it asks for that: it sends on no more than is being taken."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send, self._untold = send, 0
        self._every: int | None = (scope.get("extensions") or {}).get(TAKEN, {}).get("every")

    async def __call__(self, size: int) -> None:
        self._untold += size
        if self._every is not None and self._untold >= self._every:
            told, self._untold = self._untold, 0
            await self._send({"type": TAKEN, "bytes": told})


class _Body:
    """A request's body as it comes, until it breaks a rule. FastAPI lets HTTPException through while it reads one."""

    def __init__(self, receive: Receive, limit: int, stated: int | None, patience: Patience, tell: _Taken) -> None:
        self._receive, self._limit, self._stated, self._patience, self._tell = receive, limit, stated, patience, tell
        self._taken, self._waited, self._ended = 0, 0.0, False

    async def __call__(self) -> Message:
        if self._ended:
            return await self._receive()
        message = await self._next()
        if message["type"] != "http.request":
            self._ended = True
            return message
        self._taken += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._taken > self._limit:
            self._refuse(413, _too_large(self._limit))
        if self._stated is not None and (self._taken > self._stated or (self._ended and self._taken < self._stated)):
            self._refuse(400, f"The request body is not of the {self._stated} bytes that content-length states.")
        await self._tell(len(message.get("body", b"")))
        return message

    async def _next(self) -> Message:
        patience = self._patience
        # Only waiting counts: what this side takes to work on a piece is not the client's slowness.
        left = patience.grace_s + self._taken / patience.bytes_per_s - self._waited
        started = anyio.current_time()
        message = None
        with anyio.move_on_after(max(0.0, min(left, patience.idle_s))):
            message = await self._receive()
        self._waited += anyio.current_time() - started
        if message is None:
            self._refuse(408, f"The request body came too slowly; send at least {patience.bytes_per_s} bytes a second.")
        return message

    def _refuse(self, status: int, message: str) -> NoReturn:
        self._ended = True
        # The rest of the body is not read, so that no other request can follow it.
        raise HTTPException(status, message, headers={"connection": "close"})


def _too_large(limit: int) -> str:
    return f"The request body is larger than {limit} bytes; send less at a time."
