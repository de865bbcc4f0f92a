"""Requests over real sockets, byte by byte as they are written: what no HTTP client would send."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tests.service.raw_requests import CUT, Answer, Piece

PATIENCE_S = 120.0
HANG_UP = CUT
"""Half-close: the client sends nothing more, and still listens."""


@contextmanager
def only_sent(port: int, data: bytes) -> Iterator[socket.socket]:
    """A connection over which these bytes went."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        connection.sendall(data)
        yield connection


def exchange(port: int, *pieces: Piece) -> tuple[Answer | None, int]:
    """Send bytes, with pauses of so many seconds between them, until the server has had enough.

    Returns:
        The answer, None if the connection ended without one, and how many bytes went out.
    """
    with only_sent(port, b"") as connection:
        sent = _send(connection, pieces)
        return _answer(connection), sent


def _send(connection: socket.socket, pieces: Iterable[Piece]) -> int:
    sent = 0
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            if isinstance(piece, float):
                time.sleep(piece)
            elif piece == HANG_UP:
                connection.shutdown(socket.SHUT_WR)
            else:
                assert isinstance(piece, bytes)
                connection.sendall(piece)
                sent += len(piece)
    return sent


def _answer(connection: socket.socket) -> Answer | None:
    reading = http.client.HTTPResponse(connection)
    try:
        reading.begin()
        content = reading.read()
    except (http.client.HTTPException, ConnectionError):
        return None
    return Answer(reading.status, {name.lower(): value for name, value in reading.getheaders()}, content)
