"""Uploads as they come in: streamed and never held, refused when slow, cut or lying, and gone without a trace then."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve.api import create_api
from serve.catalogue import Catalogue
from serve.failures import ApiError
from serve.middleware import BodyLimit, Patience
from serve.routes.transfers import in_thread
from serve.routes.uploads import FormReader
from serve.service import Service
from serve.wire.files import FilesConfig
from tests.service.raw_requests import CUT, STALL, Piece, send, send_now

WAIT_S = 120.0
LINES = b'{"prompt": "2 + 2 =", "completion": " 4"}\n' * 12
HEAD = (
    b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
TAIL = b"\r\n--B--\r\n"
FORM = HEAD + LINES + TAIL


@dataclass(frozen=True)
class World:
    """A service with the key of one tenant."""

    app: FastAPI
    service: Service
    secret: str
    folder: Path
    """Where uploads lie while they come in."""

    @property
    def headers(self) -> list[tuple[str, str]]:
        content_type = "multipart/form-data; boundary=B"
        return [("authorization", f"Bearer {self.secret}"), ("content-type", content_type)]

    def send(self, *pieces: Piece, length: int | None = None) -> Any:
        stated = [] if length is None else [("content-length", str(length))]
        return send_now(self.app, pieces, [*self.headers, *stated])

    @property
    def traces(self) -> list[Any]:
        """Whatever an upload can leave behind."""
        catalogue, store = self.service.catalogue, self.service.store
        assert catalogue is not None and store is not None
        tenant = catalogue.tenants.named("anna").id
        files = [file.id for file in catalogue.files.list(tenant).items]
        kept = [catalogue.files.kept_bytes(tenant)] if catalogue.files.kept_bytes(tenant) else []
        return [*os.listdir(self.folder), *store.list(), *files, *kept]


@pytest.fixture
def make_world(service: Service, catalogue: Catalogue, tmp_path: Path) -> Callable[..., World]:
    def make(patience: Patience | None = None, **limits: Any) -> World:
        folder = tmp_path / "incoming"
        folder.mkdir(exist_ok=True)
        files = FilesConfig(folder=str(folder), **limits)
        changes = {"files": files, "patience": patience or Patience()}
        changed = replace(service, settings=service.settings.model_copy(update=changes))
        tenant = catalogue.tenants.create("anna")
        secret = catalogue.keys.create(tenant.id, ("files",)).secret
        return World(create_api(changed), changed, secret, folder)

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.mark.parametrize("step", [1, 2, 7, 64, 10_000])
def test_where_a_body_is_cut_into_pieces_does_not_matter(world: World, step: int) -> None:
    answer = world.send(*[FORM[start : start + step] for start in range(0, len(FORM), step)], length=len(FORM))
    assert answer.status == 200
    file = answer.json()
    store = world.service.store
    assert store is not None
    [key] = store.list("files")
    assert key.endswith(file["id"]) and store.read(key) == LINES and file["bytes"] == len(LINES)
    assert os.listdir(world.folder) == []


@pytest.mark.parametrize("step", [1, 3, 5, 1000])
def test_data_that_looks_like_a_boundary_stays_data(step: int, tmp_path: Path) -> None:
    data = b"\r\n--\r\n--B\x00\r\n--b--\r\n-\r\r\n\r\n--\r\n-B--" * 20
    body = HEAD + data + TAIL
    with (tmp_path / "file").open("w+b") as file:
        reader = FormReader(b"B", file, len(data))
        for start in range(0, len(body), step):
            reader.write(body[start : start + step])
        form = reader.finish()
        assert (tmp_path / "file").read_bytes() == data
    assert form.file.sha256 == hashlib.sha256(data).hexdigest() and form.file.size == len(data)
    assert form.fields == {"purpose": "fine-tune"}


def test_noise_is_a_form_or_told(tmp_path: Path) -> None:
    """1,000 forms that were broken by chance, in pieces of any size."""
    rng = random.Random(7)
    noise = [b"\r\n", b"--B", b"--B--", b";", b'"', b"\\", b"=", b":", b" ", b"\r", b"\n", b"\x00", b"\xff", b"name"]
    noise += [b"filename*=UTF-8''x", b"form-data", b"\r\n\r\n", b"--B  ", b"--B\t\r\n"]
    whole, statuses = 0, set()
    for number in range(1000):
        body = bytearray(FORM[:-100] + TAIL)
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(body) + 1)
            if rng.random() < 0.6:
                body[place:place] = rng.choice(noise)
            else:
                del body[place : place + rng.randint(1, 12)]
        step = rng.choice([1, 2, 3, 17, 1000])
        with (tmp_path / str(number)).open("w+b") as file:
            reader = FormReader(b"B", file, 1000)
            try:
                for start in range(0, len(body), step):
                    reader.write(bytes(body[start : start + step]))
                form = reader.finish()
            except ApiError as error:
                statuses.add(error.status)
            else:
                whole += 1
                assert hashlib.sha256(form.file.path.read_bytes()).hexdigest() == form.file.sha256
        (tmp_path / str(number)).unlink()
    assert statuses <= {400, 413} and 20 < whole < 980


def test_200_mb_are_never_in_memory(world: World) -> None:
    block = os.urandom(2**16)
    count = 200 * 2**20 // len(block)
    digest = hashlib.sha256()
    for _ in range(count):
        digest.update(block)

    def pieces() -> Iterable[Piece]:
        yield HEAD
        for _ in range(count):
            yield block
        yield TAIL

    world.send(FORM, CUT)  # what is imported or made once is not counted
    tracemalloc.start()
    try:
        answer = send_now(world.app, pieces(), world.headers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.status == 200 and answer.json()["bytes"] == count * len(block)
    catalogue = world.service.catalogue
    assert catalogue is not None
    file = catalogue.files.get(catalogue.tenants.named("anna").id, answer.json()["id"])
    assert file.sha256 == digest.hexdigest()
    # A block on its way to the disk, one that is collected, and what the store reads at a time.
    assert peak < 24 * 2**20
    assert os.listdir(world.folder) == []


def test_a_file_of_exactly_the_limit_fits_and_one_more_byte_does_not(make_world: Callable[..., World]) -> None:
    world = make_world(max_bytes=100_000)
    for stated in (True, False):
        body = HEAD + b"x" * 100_001 + TAIL
        answer = world.send(body, length=len(body) if stated else None)
        assert answer.status == 413 and answer.json()["error"]["type"] == "invalid_request_error"
        assert world.traces == []
    body = HEAD + b"x" * 100_000 + TAIL
    assert world.send(body, length=len(body)).status == 200


def test_a_body_that_states_too_much_is_refused_unread(make_world: Callable[..., World]) -> None:
    world = make_world(max_bytes=100_000)
    answer = world.send(STALL, length=2**33)
    assert answer.status == 413 and "larger than" in answer.json()["error"]["message"]
    assert world.traces == []


def test_a_body_without_end_is_refused_at_the_limit(make_world: Callable[..., World]) -> None:
    world = make_world(max_bytes=2_000_000)

    def endless() -> Iterator[Piece]:
        yield HEAD
        while True:
            yield b"x" * 65536

    answer = send_now(world.app, endless(), world.headers)
    assert answer.status == 413 and world.traces == []


@pytest.mark.parametrize(
    ("pieces", "length"),
    [
        ((FORM,), len(FORM) + 1),
        ((FORM,), len(FORM) - 1),
        ((FORM[:200], FORM[200:]), 200),
        ((FORM,), 0),
        ((), 500),
    ],
)
def test_a_body_that_lies_about_its_length_leaves_nothing(world: World, pieces: tuple[bytes, ...], length: int) -> None:
    answer = world.send(*pieces, length=length)
    assert answer.status == 400 and f"{length} bytes" in answer.json()["error"]["message"]
    assert answer.headers["connection"] == "close" and world.traces == []


@pytest.mark.parametrize("cut", [0, 1, 30, len(HEAD) - 1, len(HEAD) + 100, len(FORM) - 3])
def test_a_client_that_goes_away_leaves_nothing(world: World, cut: int) -> None:
    answer = world.send(FORM[:cut], CUT, length=len(FORM))
    assert answer.status == 400 and world.traces == []


def test_a_body_that_stalls_is_given_up(make_world: Callable[..., World]) -> None:
    world = make_world(Patience(idle_s=0.2))
    for pieces in ((STALL,), (HEAD, STALL), (FORM[:-2], STALL)):
        answer = world.send(*pieces, length=len(FORM))
        assert answer.status == 408 and "too slowly" in answer.json()["error"]["message"]
        assert answer.headers["connection"] == "close" and world.traces == []


def test_a_body_that_trickles_is_given_up(make_world: Callable[..., World]) -> None:
    world = make_world(Patience(idle_s=60, grace_s=0.3, bytes_per_s=10**6))

    def trickle() -> Iterator[Piece]:
        yield HEAD
        while True:
            yield 0.01
            yield b"x"

    answer = send_now(world.app, trickle(), world.headers)
    assert answer.status == 408 and world.traces == []


def test_bodies_in_json_may_not_stall_either(make_world: Callable[..., World]) -> None:
    world = make_world(Patience(idle_s=0.2))
    catalogue = world.service.catalogue
    assert catalogue is not None
    secret = catalogue.keys.create(catalogue.tenants.named("anna").id, ("inference",)).secret
    headers = [("authorization", f"Bearer {secret}"), ("content-type", "application/json"), ("content-length", "100")]
    answer = send_now(world.app, (b'{"model": ', STALL), headers, path="/v1/completions")
    assert answer.status == 408 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_slow_server_is_not_the_clients_slowness() -> None:
    async def slow_reader(scope: Scope, receive: Receive, to: Send) -> None:
        async for _ in Request(scope, receive).stream():
            await asyncio.sleep(0.2)
        await PlainTextResponse("done")(scope, receive, to)

    app = BodyLimit(slow_reader, 1000, patience=Patience(idle_s=1.0, grace_s=1.0, bytes_per_s=10**6))
    assert send_now(app, [b"x"] * 7).status == 200


def test_uploads_of_one_tenant_at_a_time_are_limited(make_world: Callable[..., World], catalogue: Catalogue) -> None:
    world = make_world(Patience(idle_s=600, grace_s=600), uploads=1)
    ben = catalogue.keys.create(catalogue.tenants.create("ben").id, ("files",)).secret
    bens = [("authorization", f"Bearer {ben}"), world.headers[1]]

    async def run() -> None:
        waiting = asyncio.create_task(send(world.app, (HEAD, STALL), world.headers))
        deadline = time.monotonic() + WAIT_S
        while not os.listdir(world.folder):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        refused = await send(world.app, (FORM,), world.headers)
        assert refused.status == 429 and int(refused.headers["retry-after"]) > 0
        assert (await send(world.app, (FORM,), bens)).status == 200
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert world.traces == [key for key in world.traces if "/" in key]  # ben's file alone
        assert (await send(world.app, (FORM,), world.headers)).status == 200

    asyncio.run(run())
    assert os.listdir(world.folder) == []


def test_a_slow_store_leaves_threads_to_other_requests() -> None:
    go_on = threading.Event()

    async def run() -> None:
        slow = [asyncio.create_task(in_thread(go_on.wait, WAIT_S)) for _ in range(100)]
        try:
            with anyio.fail_after(WAIT_S):
                await anyio.to_thread.run_sync(str)
            assert not any(task.done() for task in slow)
        finally:
            go_on.set()
            assert all(await asyncio.gather(*slow))

    asyncio.run(run())


def test_what_a_killed_server_left_is_removed_in_time(world: World) -> None:
    old, fresh, other = (world.folder / name for name in ("ot-ray-upload-1", "ot-ray-upload-2", "something"))
    for path in (old, fresh, other):
        path.write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (old, other):
        os.utime(path, (two_days_ago, two_days_ago))
    assert world.send(FORM).status == 200
    assert sorted(os.listdir(world.folder)) == ["ot-ray-upload-2", "something"]


def test_a_disk_without_room_is_a_503(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: FormReader, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FormReader, "write", full)
    answer = world.send(FORM)
    assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
    assert str(world.folder) not in answer.content.decode() and world.traces == []


@pytest.fixture
def port(make_world: Callable[..., World]) -> Iterator[tuple[int, World]]:
    """The application behind a real HTTP server; requests with `x-impatient` meet one that waits for nobody."""
    world = make_world(max_bytes=200_000)
    settings = world.service.settings.model_copy(update={"patience": Patience(idle_s=0.3)})
    impatient = create_api(replace(world.service, settings=settings))

    async def either(scope: Scope, receive: Receive, to: Send) -> None:
        app = impatient if b"x-impatient" in dict(scope["headers"]) else world.app
        await app(scope, receive, to)

    config = uvicorn.Config(either, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield server.servers[0].sockets[0].getsockname()[1], world
    server.should_exit = True
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_over_a_real_connection_nothing_bad_stays(port: tuple[int, World]) -> None:
    number, world = port
    head = "".join(f"{name}: {value}\r\n" for name, value in world.headers)

    def talk(body: bytes, extra: str, hang_up: bool = False) -> bytes:
        request = f"POST /v1/files HTTP/1.1\r\nHost: x\r\n{head}{extra}\r\n".encode() + body
        with socket.create_connection(("127.0.0.1", number), timeout=WAIT_S) as connection:
            connection.sendall(request)
            if hang_up:
                return b""
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
                if b"\r\n\r\n" in answer and b"}" in answer:
                    break
            return answer

    def chunk(data: bytes) -> bytes:
        return f"{len(data):x}\r\n".encode() + data + b"\r\n"

    stalled = talk(FORM[:100], f"X-Impatient: 1\r\nContent-Length: {len(FORM)}\r\n")
    assert stalled.startswith(b"HTTP/1.1 408")
    assert talk(b"", "Content-Length: 99999999\r\n").startswith(b"HTTP/1.1 413")
    chunked = chunk(HEAD + b"x" * 300_000 + TAIL) + b"0\r\n\r\n"
    assert talk(chunked, "Transfer-Encoding: chunked\r\n").startswith(b"HTTP/1.1 413")
    assert talk(b"zz\r\n", "Transfer-Encoding: chunked\r\n").startswith(b"HTTP/1.1 400")
    talk(FORM[:150], f"Content-Length: {len(FORM)}\r\n", hang_up=True)
    deadline = time.monotonic() + WAIT_S
    while world.traces:
        assert time.monotonic() < deadline, world.traces
        time.sleep(0.05)
    good = talk(chunk(FORM) + b"0\r\n\r\n", "Transfer-Encoding: chunked\r\n")
    assert good.startswith(b"HTTP/1.1 200") and b'"object":"file"' in good
