"""Connections of Ray's HTTP proxy: a request's head has a bounded size and must come within a bounded time.

Uvicorn bounds neither, and no middleware sees a request before its head is whole; bodies are left to gate.py."""

from __future__ import annotations

import asyncio
import json
import logging

import uvicorn.protocols.http.auto as chosen
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.failures import ApiError
from serve.middleware import MOST_HEADER_BYTES

PATIENCE_S = 30.0
"""Seconds for a head to come, and for a body to end that nobody reads because its request was answered."""
MOST_LOOSE = 2 * MOST_HEADER_BYTES
"""Bytes without a request or a part of a body in them: heads, trailers and what surrounds chunks."""

_log = logging.getLogger(__name__)


def bound_heads() -> None:
    """Have every HTTP server of this process that starts from now on, and has the choice, use `BoundedHeads`."""
    # Ray's proxy has no setting for it, and lets uvicorn choose.
    if issubclass(chosen.AutoHTTPProtocol, HttpToolsProtocol):
        chosen.AutoHTTPProtocol = BoundedHeads
    else:
        _log.warning("heads of requests are not bounded in time: uvicorn uses %s", chosen.AutoHTTPProtocol.__name__)


class BoundedHeads(HttpToolsProtocol):
    """Uvicorn's protocol, whose connections end when a head is too large or too slow."""

    patience_s = PATIENCE_S
    _loose = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._loose += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            self._stop_clock()
        elif self._loose > MOST_LOOSE:
            self._refuse(f"The request's head is larger than {MOST_HEADER_BYTES} bytes; send less.", 431)
        elif not self._answering:
            self._start_clock()

    def on_headers_complete(self) -> None:
        self._stop_clock()
        self._loose = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        super().on_body(body)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_clock(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.patience_s, self._too_slow)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._answering or self.transport.is_closing():
            return
        if self._loose and self.cycle is None:
            self._refuse(f"The request's head did not come within {self.patience_s:g} seconds.", 408)
        else:
            self.transport.close()

    def _refuse(self, message: str, status: int) -> None:
        self._stop_clock()
        # In the middle of an answer there is no place for another.
        if not self._answering:
            error = ApiError(message, status)
            body = json.dumps(error.body).encode()
            head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
