"""A real HTTP server that receives webhooks, and answers as its paths say."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Receiver:
    """What came in, by path, and what goes out.

    `/status/503` answers 503, `/hang` nothing until the end, `/drip` a head that never ends, slowly, `/flood` one
    without end at once, `/garbage` what is no HTTP, `/redirect` a way to `/elsewhere`; every other path what `answers`
    holds for it next, and else 200.
    """

    port: int = 0
    scheme: str = "http"
    received: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def at(self, path: str) -> list[tuple[dict[str, str], bytes]]:
        return [(headers, body) for where, headers, body in self.received if where == path]


@contextmanager
def receiver(certificate: tuple[Path, Path] | None = None) -> Iterator[Receiver]:
    """Serve on a free port until the end of the block.

    Args:
        certificate: PEM files of a certificate and its key, for https.
    """
    scene = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            scene.received.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            with suppress(OSError):
                self._answer()

        def _answer(self) -> None:
            if self.path == "/hang":
                scene.over.wait()
            elif self.path == "/drip":
                self.wfile.write(b"HTTP/1.1 200")
                while not scene.over.wait(0.05):
                    self.wfile.write(b" ")
            elif self.path == "/flood":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while not scene.over.is_set():
                    self.wfile.write(b"x-more: and more\r\n" * 100)
            elif self.path == "/garbage":
                self.wfile.write(b"220 mail.example ESMTP\r\n\r\n")
            else:
                self._plain()

        def _plain(self) -> None:
            left = scene.answers.get(self.path, [])
            status = int(self.path.split("/")[2]) if self.path.startswith("/status/") else left.pop(0) if left else 200
            if self.path == "/redirect":
                status = 307
            self.send_response(status)
            if self.path == "/redirect":
                self.send_header("location", scene.url("/elsewhere"))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: that clients go away is part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    scene.port = server.server_port
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scene.scheme = "https"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield scene
    finally:
        scene.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
