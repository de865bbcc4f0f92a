"""What surrounds every request whatever its route: an id, a last resort for errors, and a limit on bodies.

Errors that a route knows are told in api.py."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.failures import ApiError, api_error

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


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
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
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
            failure = api_error(error)
            await JSONResponse(failure.body, failure.status, failure.headers)(scope, receive, send_with_id)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, by their stated length or while they come."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated) > self._limit:
            failure = ApiError(self._message(), 413)
            await JSONResponse(failure.body, failure.status, failure.headers)(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                # The class that FastAPI lets through while it reads a body.
                raise HTTPException(413, self._message())
            return message

        await self._app(scope, counted, send)

    def _message(self) -> str:
        return f"The request body is larger than {self._limit} bytes; send fewer or shorter prompts at a time."
