"""Requests as a server hands them to an application, piece by piece: whole, cut off, stalled, or lying."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

CUT, STALL = "cut", "stall"
Piece = bytes | str | float
"""Bytes, a pause in seconds, `CUT` (the client goes away) or `STALL` (it says nothing more)."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


async def send(
    app: ASGIApp,
    pieces: Iterable[Piece] = (),
    headers: Iterable[tuple[str | bytes, str | bytes]] = (),
    method: str = "POST",
    path: str = "/v1/files",
    query: bytes = b"",
) -> Answer:
    """Send one request; its body ends after the last piece."""
    coming = iter(pieces)
    sent: list[Message] = []
    ended = False

    async def receive() -> Message:
        nonlocal ended
        if ended:
            return {"type": "http.disconnect"}
        piece = next(coming, None)
        while isinstance(piece, float):
            await asyncio.sleep(piece)
            piece = next(coming, None)
        if piece == STALL:
            await asyncio.Event().wait()
        ended = piece in (None, CUT)
        if piece == CUT:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def take(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [(_latin(name).lower(), _latin(value)) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, take)
    start = sent[0]
    return Answer(
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        b"".join(message.get("body", b"") for message in sent[1:]),
    )


def send_now(app: ASGIApp, *arguments: Any, **named: Any) -> Answer:
    """`send` from a test that is no coroutine."""
    return asyncio.run(send(app, *arguments, **named))


def _latin(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")
