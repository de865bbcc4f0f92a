"""A small HTTP proxy in front of a real server that breaks chosen requests."""

from __future__ import annotations

import http.client
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = {503: "SlowDown", 500: "InternalError", 403: "AccessDenied", 507: "InsufficientStorage"}


@dataclass(frozen=True)
class Seen:
    """One request: its method, its path and query, the bytes it asked for, its signature, what a POST said."""

    method: str
    path: str
    range: str | None
    authorization: str = field(default="", compare=False, repr=False)
    posted: bytes = field(default=b"", compare=False, repr=False)


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on and records them in `seen`.

    Each entry of `faults` is spent on one request of `method` (any, if None): a status to answer with,
    "lose" (pass it on, then hang up without an answer), ("cut", n) (hang up after n bytes of the body), or
    "pass". `forever` is the fault of all further ones.
    """

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(server).netloc
        self.faults: deque[int | str | tuple[str, int]] = deque()
        self.forever: int | str | tuple[str, int] | None = None
        self.method: str | None = None
        self.seen: list[Seen] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def next_fault(self, method: str) -> int | str | tuple[str, int] | None:
        if self.method not in (None, method):
            return None
        return self.faults.popleft() if self.faults else self.forever


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"  # clients that wait for "100 Continue" get it

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        signed, posted = self.headers.get("Authorization", ""), body if self.command == "POST" else b""
        self.server.seen.append(Seen(self.command, self.path, self.headers.get("Range"), signed, posted))
        fault = self.server.next_fault(self.command)
        if isinstance(fault, int):
            self._refuse(fault)
            return
        status, headers, answer = self._forward(body)
        if fault == "lose":
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer[: fault[1]] if isinstance(fault, tuple) else answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _refuse(self, status: int) -> None:
        code = FAULTS[status]
        answer = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.target, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, response.getheaders(), answer

    def log_message(self, format: str, *args: object) -> None:
        """The proxy records requests itself."""
