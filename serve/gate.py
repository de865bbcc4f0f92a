"""What stands before Ray's HTTP proxy, in the proxy's own process: it bounds what a request makes the proxy hold.

Ray calls `middlewares` there (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`); what a request means is left to api.py."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.failures import ApiError
from serve.middleware import TAKEN, check_headers, refuse, request_id_of

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.gate.middlewares"}
"""The environment in which Ray's proxy puts the gate before itself."""
WINDOW = 2 * 2**20
"""Bytes of one request's body that wait between the client and the application at most, a piece more or less."""

_log = logging.getLogger(__name__)
# Ray takes orders from these: how long a request may take, whether it ends with its client, which replica answers.
_RAYS_OWN = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-session-id",
        b"serve-multiplexed-model-id",
        b"x-request-id",
    }
)


def middlewares() -> list[Middleware]:
    """What Ray's proxy puts before itself; also has its server refuse heads without end."""
    from serve.connections import bound_heads

    bound_heads()
    return [Middleware(Gate)]


class Gate:
    """Lets a body through as fast as the application takes it, where the proxy would take all that comes.

    It counts on an application that tells what it takes (`serve.middleware.TAKEN`). It answers for a proxy that
    fails or has nothing to say, refuses large heads and WebSockets, and keeps headers from Ray that steer it.

    Args:
        window: bytes of a body that the application may be behind.
    """

    def __init__(self, app: ASGIApp, window: int = WINDOW) -> None:
        self._app, self._window = app, window

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no WebSockets here"})
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(scope)
        answer = _Answer(send, request_id)
        try:
            check_headers(scope)
        except ApiError as error:
            await refuse(error, scope, receive, answer.of_our_own)
            return
        passed = [(name, value) for name, value in scope["headers"] if _plain(name) not in _RAYS_OWN]
        extensions = {**(scope.get("extensions") or {}), TAKEN: {"every": max(1, self._window // 8)}}
        inner = {
            **scope,
            "headers": [*passed, (b"x-request-id", request_id.encode())],
            "extensions": extensions,
        }
        body = _Body(receive, self._window)
        answer.body = body
        try:
            await self._app(inner, body, answer)
        except Exception as error:
            if answer.begun:
                raise
            _log.exception("request %s failed in the proxy", request_id)
            await refuse(error, scope, receive, answer.of_our_own)
            return
        if not answer.begun:
            gone = ApiError("The service could not answer this request; try again.", 503, "unavailable", None, 2)
            await refuse(gone, scope, receive, answer.of_our_own)


class _Answer:
    """Sends what the application answers to the client, and what it says of the body to that."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._id = send, request_id
        self.begun = self._nobody = False
        self.body: _Body | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == TAKEN:
            if self.body is not None:
                self.body.taken(message["bytes"])
            return
        self._nobody = self._nobody or _of_nobody(message)
        if self._nobody:
            return
        self.begun = True
        await self._send(message)

    async def of_our_own(self, message: Message) -> None:
        """As a call, of an answer to which Ray's proxy adds no request id."""
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id.encode())]
        self.begun = True
        await self._send(message)


class _Body:
    """A body that stays with the client while the application is behind by more than the window."""

    def __init__(self, receive: Receive, window: int) -> None:
        self._receive, self._room = receive, window
        self._more = asyncio.Event()

    def taken(self, size: int) -> None:
        """The application has taken so many bytes more."""
        self._room += size
        if self._room > 0:
            self._more.set()

    async def __call__(self) -> Message:
        message: Any = await self._receive()
        # A piece is asked for first, and waits in hand, so that a client that has gone away by then is noticed.
        while message["type"] == "http.request" and self._room <= 0:
            self._more.clear()
            await self._more.wait()
        self._room -= len(message.get("body", b""))
        return message


def _of_nobody(message: Message) -> bool:
    """Whether Ray's proxy begins to say that it knows of no application yet; one that there is answers in JSON."""
    if message["type"] != "http.response.start" or message["status"] != 404:
        return False
    return any(name.lower() == b"content-type" and value.startswith(b"text/") for name, value in message["headers"])


def _plain(name: bytes) -> bytes:
    # Proxies on the way write one for the other, and Ray takes either.
    return name.lower().replace(b"_", b"-")
