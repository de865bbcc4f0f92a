"""The client's HTTP by itself: which addresses are none, and answers that break off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ot_ray.client.http import Http
from ot_ray.client.uploads import _offset
from ot_ray.errors import ConfigError, ServiceError

WHOLE = b'{"data": [1, 2, 3]}'


@contextmanager
def server(answers: list[bytes]) -> Iterator[str]:
    """Answers each request with the next body, of which it says that it is as long as the whole one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(WHOLE)))
            self.end_headers()
            self.wfile.write(answers.pop(0))

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    answers = [WHOLE[:7], b"", WHOLE]
    with server(answers) as url:
        assert Http(url, "key").json("GET", "/x") == {"data": [1, 2, 3]}
    assert not answers


def test_answers_that_always_break_off_end_with_the_services_error() -> None:
    with server([WHOLE[:7]] * 100) as url, pytest.raises(ServiceError, match="does not answer"):
        Http(url, "key", patience_s=0.5).json("GET", "/x")


def test_a_service_that_knows_no_uploads_is_told_in_words() -> None:
    with server([b""]) as url, pytest.raises(ServiceError, match="does not say how much"):
        _offset(Http(url, "key"), "/x")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host",
        "https://",
        "https://user@host",
        "https://@host",
        "https://host?x=1",
        "https://host#part",
        "https://host:port",
        "https://host:99999",
        "https://host:0",
        "https://[::1",
        "https://host/a b",
        "https://host/\u00fc",
        "https://host/\x7f",
    ],
)
def test_what_is_no_address_is_told_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="is no service"):
        Http(url, "key")


@pytest.mark.parametrize("url", ["http://host", "https://host:8443/prefix/", "https://[::1]:80"])
def test_addresses_of_services(url: str) -> None:
    assert Http(url, "key").url == url.rstrip("/")
