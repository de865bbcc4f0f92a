"""What stands before Ray's proxy: bodies wait at the client, heads are bounded in size and time, failures are told."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvicorn.protocols.http.auto as chosen
import yaml
from starlette.types import Message, Receive, Scope, Send

from serve.connections import MOST_LOOSE, BoundedHeads, bound_heads
from serve.gate import CALLBACK, Gate, middlewares
from serve.middleware import TAKEN, BodyLimit
from tests.service.raw_requests import send_now
from tests.service.sockets import exchange, only_sent

PIECE, WINDOW = b"x" * 1000, 8000


class Pieces:
    """A client that has always more to send."""

    def __init__(self, message: str = "http.request") -> None:
        self.given = 0
        self.message = message

    async def __call__(self) -> Message:
        self.given += 1
        return {"type": self.message, "body": PIECE, "more_body": True}


def scope_of(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": list(headers)}


async def ignore(message: Message) -> None:
    pass


async def settled() -> None:
    """Every task has gone as far as it gets by itself."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_body_comes_no_faster_than_it_is_taken() -> None:
    client = Pieces()
    got: list[int] = []
    takes = asyncio.Event()

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        async def queue() -> None:
            while True:
                got.append(len((await receive())["body"]))

        taking = asyncio.create_task(queue())
        await takes.wait()
        await send({"type": TAKEN, "bytes": 3000})
        await settled()
        taking.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def scene() -> tuple[int, int]:
        asked = asyncio.create_task(Gate(proxy, WINDOW)(scope_of(), client, ignore))
        await settled()
        first = sum(got)
        takes.set()
        await asked
        return first, sum(got)

    assert asyncio.run(scene()) == (WINDOW, WINDOW + 3000)
    assert client.given == (WINDOW + 3000) // len(PIECE) + 1  # and one in hand


def test_the_service_tells_what_it_takes_where_a_gate_asks_for_it() -> None:
    sent: list[Message] = []
    client = Pieces()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(20):
            await receive()

    async def take(message: Message) -> None:
        sent.append(message)

    asyncio.run(BodyLimit(app, 10**6)(scope_of(), client, take))
    assert sent == []
    asyncio.run(BodyLimit(app, 10**6)({**scope_of(), "extensions": {TAKEN: {"every": 4000}}}, client, take))
    assert sent == [{"type": TAKEN, "bytes": 4000}] * 5


def test_a_body_of_many_windows_gets_through_whole() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        # As Ray's: whatever comes is taken at once, and lies in a queue.
        queue: asyncio.Queue[Message] = asyncio.Queue()

        async def fill() -> None:
            message: Message = {"type": ""}
            while message["type"] != "http.disconnect":
                message = await receive()
                await queue.put(message)

        filling = asyncio.create_task(fill())
        await BodyLimit(app, 10**7)(scope, queue.get, send)
        filling.cancel()

    answer = send_now(Gate(proxy, WINDOW), [PIECE] * 500)
    assert (answer.status, answer.content) == (200, b"500000")


def test_headers_that_steer_ray_do_not_pass() -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["headers"])
        await send({"type": "http.response.start", "status": 204, "headers": []})

    steering = [
        ("X-Request-Timeout-Seconds", "0.001"),
        ("x-request-disconnect-disabled", "?1"),
        ("x_session_id", "\xff"),
        ("serve_multiplexed_model_id", "\xff"),
        ("serve-multiplexed-model-id", "a"),
        ("x-request-id", "\xff\xfe"),
    ]
    send_now(Gate(app), headers=[*steering, ("accept", "*/*")])
    send_now(Gate(app), headers=[("x-request-id", "mine-1")])
    send_now(Gate(app), headers=[("x-request-id", "mine-1"), ("x-request-id", "mine-2")])
    (kept, (_, made)), own, two = seen
    assert kept == (b"accept", b"*/*") and made.startswith(b"req_")
    assert own == [(b"x-request-id", b"mine-1")]
    assert [name for name, _ in two] == [b"x-request-id"] and two[0][1].startswith(b"req_")


@pytest.mark.parametrize("headers", [[("x-a", "n" * 40_000)], [(f"x-{n}", "y") for n in range(200)]])
def test_large_heads_are_refused_before_the_proxy(headers: list[tuple[str, str]]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not reached")

    answer = send_now(Gate(app), headers=[*headers, ("x-request-id", "mine")])
    assert answer.status == 431 and answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"] == "mine"


def test_a_proxy_that_fails_or_says_nothing_is_answered_for(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": TAKEN, "bytes": 1})
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "secret detail")

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    failed, gone = send_now(Gate(fails)), send_now(Gate(silent))
    assert (failed.status, gone.status) == (500, 503)
    assert b"secret" not in failed.content and failed.json()["error"]["type"] == "server_error"
    assert failed.headers["x-request-id"] in caplog.text and "secret detail" in caplog.text
    assert gone.headers["retry-after"] == "2" and gone.json()["error"]["code"] == "unavailable"


def test_a_proxy_that_knows_of_no_application_yet_is_no_answer_to_a_customer() -> None:
    def answers(kind: bytes, body: bytes) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": body})

        return app

    nobody = send_now(Gate(answers(b"text/plain", b"Path '/v1/files' not found. Ping http://.../-/routes")))
    assert nobody.status == 503 and nobody.headers["retry-after"] == "2"
    assert nobody.json()["error"]["code"] == "unavailable"
    unknown = send_now(Gate(answers(b"application/json", b'{"error": 1}')))
    assert unknown.status == 404 and unknown.json() == {"error": 1}


def test_an_answer_that_breaks_off_is_not_answered_twice() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("broken")

    async def take(message: Message) -> None:
        sent.append(message)

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(Gate(app)(scope_of(), Pieces(), take))
    assert [message["type"] for message in sent] == ["http.response.start"]


def test_websockets_are_closed() -> None:
    sent: list[Message] = []

    async def take(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not reached")

    asyncio.run(Gate(app)({"type": "websocket"}, Pieces("websocket.connect"), take))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_callback_gives_ray_the_gate_and_uvicorn_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "AutoHTTPProtocol", chosen.AutoHTTPProtocol)
    [middleware] = middlewares()
    bound_heads()
    assert middleware.cls is Gate and not middleware.args and not middleware.kwargs
    config = uvicorn.Config(lambda: None, factory=True)
    config.load()
    assert config.http_protocol_class is BoundedHeads


def test_the_file_for_clusters_has_the_callback() -> None:
    written = yaml.safe_load((Path(__file__).parents[2] / "serve/configs/cluster.yaml").read_text())
    assert written["controller_options"] == {"runtime_env": {"env_vars": CALLBACK}}
    [(_, path)] = CALLBACK.items()
    assert path == f"{middlewares.__module__}.{middlewares.__qualname__}"


class Watched(BoundedHeads):
    """As served, with a patience that tests shorten when they have sent what must be in time."""


def lose_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "patience_s", 0.2)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server whose application answers at once what it is sent in small, and does not read what is large."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while scope["path"] != "/deaf":
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["path"] == "/slow":
            await asyncio.sleep(1.0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=Watched, lifespan="off", log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


POST = b"POST / HTTP/1.1\r\nhost: a\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
NOISE = b"x" * 65536


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET / HTTP/1.1\r\nx-a: ", id="a header"),
        pytest.param(b"GET /", id="a path"),
        pytest.param(b"GET / HTTP/1.1\r\nx-", id="a header's name"),
    ],
)
def test_a_head_without_end_is_cut_off(port: int, head: bytes) -> None:
    answer, sent = exchange(port, head, *[NOISE] * 500)
    assert sent < 500 * len(NOISE)
    assert answer is None or answer.status in (400, 431)


def test_many_headers_are_cut_off(port: int) -> None:
    answer, sent = exchange(port, b"GET / HTTP/1.1\r\n", *[b"x-a: y\r\n" * 8192] * 500)
    assert sent < 500 * 65536
    assert answer is None or answer.status == 431


def test_the_refusal_of_a_head_is_openais(port: int) -> None:
    answer, _ = exchange(port, b"GET / HTTP/1.1\r\nx-a: " + b"y" * (MOST_LOOSE + 1))
    assert answer is not None and answer.status == 431
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and "head" in error["message"]


@pytest.mark.parametrize("end", [b"0\r\nx-trailer: ", b"5;extension="], ids=["a trailer", "an extension"])
def test_what_surrounds_a_body_without_end_is_cut_off(port: int, end: bytes) -> None:
    _, sent = exchange(port, CHUNKED + end, *[NOISE] * 500)
    assert sent < 500 * len(NOISE)


@pytest.mark.parametrize("head", [b"", b"\r\n", b"GET / HTTP/1.1\r\nhost: a\r\n"], ids=["nothing", "a line", "half"])
def test_a_head_that_does_not_come_ends_the_connection(port: int, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_patience(monkeypatch)
    answer, _ = exchange(port, head)
    assert answer is None or answer.status == 408


def test_a_second_head_that_does_not_come_ends_the_connection(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_sent(port, b"") as connection:
        connection.sendall(POST + b"content-length: 2\r\n\r\nok")
        assert read_until(connection, b"ok")
        lose_patience(monkeypatch)
        connection.sendall(b"GET / HT")
        assert connection.recv(1000) == b""


def test_a_body_that_nobody_reads_ends_with_the_connection(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_sent(port, b"POST /deaf HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n") as connection:
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        lose_patience(monkeypatch)
        connection.sendall(b"x")
        assert connection.recv(1000) == b""


def test_requests_that_follow_each_other_are_answered(port: int) -> None:
    with only_sent(port, b"") as connection:
        for number in range(5):
            body = json.dumps(number).encode() * 1000
            connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
            read_until(connection, body)


def test_an_answer_may_take_longer_than_a_head(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_sent(port, b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nok") as connection:
        lose_patience(monkeypatch)
        connection.sendall(b"GET / HT")
        read_until(connection, b"ok")


def read_until(connection: socket.socket, end: bytes) -> bytes:
    got = b""
    while not got.endswith(end):
        piece = connection.recv(65536)
        assert piece, got
        got += piece
    return got
