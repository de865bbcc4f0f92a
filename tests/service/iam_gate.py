"""A gate before the S3 server that lets through what IAM would: sessions do what their policy allows, until they end.

The server behind makes the sessions and keeps the objects; iam.py says what a policy allows."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.service.iam import allowed, asked_by

OWNER = "test-key"
"""Key id of the service itself, which may do everything."""


@dataclass
class Lent:
    """A session that was made here."""

    key_id: str
    token: str = field(repr=False)
    policy: dict[str, Any]
    seconds: int
    """As they were asked for."""
    over: bool = False
    """Set by the test; its requests are refused from then on."""


@dataclass(frozen=True)
class Passed:
    """A request that was seen, by whom, and how it was answered."""

    key_id: str
    method: str
    path: str
    status: int


class IamGate(ThreadingHTTPServer):
    """Passes requests on to a server, as far as whoever signs them may make them.

    `life_s` is what sessions are said to last, whatever was asked for; they end when a test says so, and no sooner.
    `ahead_s` is how far the clock of the provider is ahead of this machine's. `before` is called with each request of
    a session (its key id, method and path) before it is judged; a status that it returns is the answer. `made` is
    called with each new session before it is given out. `sts_away` refuses to make any.
    """

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(server).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lent: list[Lent] = []
        self.seen: list[Passed] = []
        self.life_s, self.ahead_s = 900.0, 0.0
        self.before: Callable[[str, str, str], int | None] = lambda key_id, method, path: None
        self.made: Callable[[Lent], None] = lambda lent: None
        self.sts_away = False
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def session(self, key_id: str) -> Lent | None:
        return next((lent for lent in self.lent if lent.key_id == key_id), None)

    def by(self, key_id: str) -> list[Passed]:
        """What somebody asked for."""
        return [passed for passed in self.seen if passed.key_id == key_id]


class _Handler(BaseHTTPRequestHandler):
    server: IamGate  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"  # clients that wait for "100 Continue" get it

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        signed = re.search(r"Credential=([^/]+)/[0-9]+/[^/]+/([a-z0-9]+)/", self.headers.get("Authorization", ""))
        key_id, service = signed.groups() if signed else ("", "")
        if service == "sts":
            status, headers, answer = self._make(key_id, body)
        else:
            status, headers, answer = self._judge(key_id, body) or self._forward(body)
        lent = self.server.session(key_id)
        if lent is not None and status == 404 and self.command in ("GET", "HEAD"):
            # S3 says to nobody who may not list the whole bucket what is not there.
            status, headers, answer = _refused(403, "AccessDenied")
        self.server.seen.append(Passed(key_id, self.command, self.path, status))
        self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _judge(self, key_id: str, body: bytes) -> _Answer | None:
        """The refusal of a request, if it is one that is refused."""
        if key_id == OWNER:
            return None
        if (status := self.server.before(key_id, self.command, self.path)) is not None:
            return _refused(status, "SlowDown")
        lent = self.server.session(key_id)
        if lent is None or self.headers.get("X-Amz-Security-Token") != lent.token:
            return _refused(403, "InvalidAccessKeyId")
        if lent.over:
            return _refused(400, "ExpiredToken")
        asked = asked_by(self.command, self.path, body if self.command == "POST" else b"")
        if not all(allowed(lent.policy, *item) for item in asked):
            return _refused(403, "AccessDenied")
        return None

    def _make(self, key_id: str, body: bytes) -> _Answer:
        if key_id != OWNER:
            return _refused(403, "AccessDenied")
        if self.server.sts_away:
            return _refused(503, "ServiceUnavailable")
        status, headers, answer = self._forward(body)
        text, asked = answer.decode(), parse_qs(body.decode())
        if status == 200:
            now = datetime.now(timezone.utc) + timedelta(seconds=self.server.ahead_s)
            ends = (now + timedelta(seconds=self.server.life_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            text = re.sub(r"(<Expiration>)[^<]*", rf"\g<1>{ends}", text)
            found = {name: _element(text, name) for name in ("AccessKeyId", "SessionToken")}
            policy, seconds = json.loads(asked["Policy"][0]), int(asked["DurationSeconds"][0])
            self.server.lent.append(Lent(found["AccessKeyId"], found["SessionToken"], policy, seconds))
            self.server.made(self.server.lent[-1])
            headers = [pair for pair in headers if pair[0].lower() not in ("content-length", "date")]
            headers += [("Content-Length", str(len(text.encode()))), ("Date", format_datetime(now, usegmt=True))]
        return status, headers, text.encode()

    def _forward(self, body: bytes) -> _Answer:
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, response.getheaders(), answer

    def _answer(self, status: int, headers: list[tuple[str, str]], answer: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """The gate records requests itself."""


_Answer = tuple[int, list[tuple[str, str]], bytes]


def _refused(status: int, code: str) -> _Answer:
    answer = f"<Error><Code>{code}</Code><Message>as IAM has it</Message></Error>".encode()
    return status, [("Content-Length", str(len(answer)))], answer


def _element(text: str, name: str) -> str:
    match = re.search(rf"<{name}>([^<]+)</{name}>", text)
    assert match is not None, name
    return match[1]
