"""`Idempotency-Key`: one effect however often, by however many, and whatever dies in between."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse

from ot_ray.store import LocalStore
from serve.api import create_api
from serve.catalogue import SCOPES, Catalogue, schema
from serve.catalogue.idempotency import Answered, Begun, Busy, Reused
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.failures import ApiError
from serve.routes.identity import Identity, needs
from serve.routes.once import OnceRoute, once_of
from serve.service import Service
from tests.service.clients import ClientOf, new_key
from tests.service.database_time import let_pass

PATIENCE_S = 120.0
Effects = list[str]


class Order(BaseModel):
    """What the test's own route is asked for."""

    text: str = ""
    status: int = 200
    """How the request ends: 200, or the status of its error, raised after its effect."""
    stream: bool = False


class Counter:
    """A route with an effect that can be counted and held up."""

    def __init__(self) -> None:
        self.effects: Effects = []
        self.endings: list[int] = []
        """How the next requests end, whatever they ask for."""
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.router = APIRouter(prefix="/v1", route_class=OnceRoute)
        self.router.post("/orders", response_model=None)(self._order)

    def _order(
        self, request: Request, body: Order, identity: Annotated[Identity, Depends(needs("jobs"))]
    ) -> dict[str, Any] | Response:
        once = once_of(request)
        once.hide("secret")
        order = {"id": once.new_id("order-"), "other": once.new_id("other-"), "text": body.text, "secret": "s3cret"}
        self.effects.append(order["id"])
        self.begun.set()
        assert self.go_on.wait(PATIENCE_S)
        status = self.endings.pop(0) if self.endings else body.status
        if status >= 400:
            raise ApiError("it failed", status) if status != 599 else RuntimeError("it broke")
        return StreamingResponse(iter([json.dumps(order)])) if body.stream else order


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def client(
    any_catalogue: Catalogue, counter: Counter, base_backend: Backend, settings: ServeConfig, store: LocalStore
) -> Iterator[TestClient]:
    api = create_api(Service(base_backend, settings, any_catalogue, store))
    api.include_router(counter.router)
    key = new_key(any_catalogue, "anna")
    with TestClient(api, headers={"authorization": f"Bearer {key}"}, raise_server_exceptions=False) as opened:
        yield opened


def order(client: TestClient, key: str | None = "k", headers: dict[str, str] | None = None, **body: Any) -> Any:
    """Post an order under a key."""
    sent = {} if key is None else {"idempotency-key": key}
    return client.post("/v1/orders", json=body, headers={**sent, **(headers or {})})


def test_the_same_request_again_is_answered_as_before(client: TestClient, counter: Counter) -> None:
    first, again = order(client, text="a"), order(client, text="a")
    assert first.status_code == again.status_code == 200 and len(counter.effects) == 1
    assert again.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in first.headers
    assert again.json() == {**first.json(), "secret": None} and first.json()["secret"] == "s3cret"
    assert first.json()["id"].removeprefix("order-") != first.json()["other"].removeprefix("other-")
    assert order(client, key="other", text="a").json()["id"] != first.json()["id"]
    assert order(client, key=None, text="a").json()["id"] != order(client, key=None, text="a").json()["id"]


def test_a_key_belongs_to_one_request(client: TestClient, counter: Counter) -> None:
    order(client, text="a")
    refused = order(client, text="b")
    assert refused.status_code == 422 and refused.headers["x-should-retry"] == "false"
    assert refused.json()["error"]["code"] == "idempotency_key_reused"
    assert client.post("/v1/orders?x=1", json={"text": "a"}, headers={"idempotency-key": "k"}).status_code == 422
    assert len(counter.effects) == 1


def test_a_key_belongs_to_one_tenant(client: TestClient, any_catalogue: Catalogue, counter: Counter) -> None:
    bea = {"authorization": f"Bearer {new_key(any_catalogue, 'bea')}"}
    assert order(client, text="a").status_code == order(client, text="b", headers=bea).status_code == 200
    assert len(set(counter.effects)) == 2


def test_of_many_at_once_one_is_carried_out(client: TestClient, counter: Counter) -> None:
    counter.go_on.clear()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(order, client, text="a")
        assert counter.begun.wait(PATIENCE_S)
        busy = [order(client, text="a") for _ in range(3)]
        counter.go_on.set()
        assert first.result(PATIENCE_S).status_code == 200
    for answer in busy:
        assert answer.status_code == 409 and 1 <= int(answer.headers["retry-after"]) <= 5
        assert "x-should-retry" not in answer.headers, "clients try again by themselves"
    assert order(client, text="a").headers["idempotency-replayed"] == "true"
    assert len(counter.effects) == 1


def test_a_request_that_takes_long_is_not_taken_over(
    client: TestClient, counter: Counter, any_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held_since(seconds: int) -> bool:
        """Whether the request was held on to within the last so many seconds."""
        found = client.app.state.service.catalogue.idempotency  # type: ignore[attr-defined]
        with found._database.read() as connection:
            age = found._database.shared_now() - schema.idempotency.c.begun_at
            return connection.execute(sa.select(age)).scalar_one() < seconds

    monkeypatch.setattr("serve.routes.once._BEAT_S", 0.05)
    counter.go_on.clear()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(order, client, text="a")
        try:
            assert counter.begun.wait(PATIENCE_S)
            let_pass(any_database_url, "idempotency.begun_at", 10_000)
            deadline = time.monotonic() + PATIENCE_S
            while not held_since(5_000):
                assert time.monotonic() < deadline, "nobody held on to it"
                time.sleep(0.02)
            assert order(client, text="a").status_code == 409
        finally:
            counter.go_on.set()
        assert first.result(PATIENCE_S).status_code == 200
    assert order(client, text="a").headers["idempotency-replayed"] == "true"
    assert len(counter.effects) == 1


@pytest.mark.parametrize("status", [400, 404, 409, 429])
def test_a_refusal_frees_the_key(client: TestClient, counter: Counter, status: int) -> None:
    assert order(client, status=status).status_code == status
    assert order(client, text="mended").status_code == 200
    assert len(set(counter.effects)) == 2


@pytest.mark.parametrize("status", [500, 503, 599])
def test_after_a_failure_the_next_try_makes_the_same(client: TestClient, counter: Counter, status: int) -> None:
    for _ in range(2):
        assert order(client, status=status).status_code in (500, 503)
    first, again = counter.effects
    assert first == again, "what the first one made is found by its id"
    assert order(client, status=400).status_code == 422, "nobody knows whether the first had an effect"


def test_a_refusal_of_a_later_try_keeps_the_key(client: TestClient, counter: Counter) -> None:
    counter.endings = [503, 429, 404]
    assert [order(client, text="a").status_code for _ in range(4)] == [503, 429, 404, 200]
    assert len(counter.effects) == 4 and len(set(counter.effects)) == 1, "the first may have had its effect"
    assert order(client, text="a").headers["idempotency-replayed"] == "true"


def test_a_request_that_is_cancelled_leaves_its_key_to_the_next_try(client: TestClient, counter: Counter) -> None:
    async def cut_off() -> None:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=client.headers) as asking:
            sent = asking.post("/v1/orders", json={"text": "a"}, headers={"idempotency-key": "k"})
            task = asyncio.create_task(sent)
            assert await asyncio.to_thread(counter.begun.wait, PATIENCE_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    counter.go_on.clear()
    try:
        asyncio.run(cut_off())
    finally:
        counter.go_on.set()
    assert order(client, text="a").status_code == 200, "at once, not in a minute"
    assert len(counter.effects) == 2 and len(set(counter.effects)) == 1


def test_a_replay_needs_the_scope(client: TestClient, any_catalogue: Catalogue, counter: Counter) -> None:
    assert order(client, text="a").status_code == 200
    files_only = {"authorization": f"Bearer {new_key(any_catalogue, 'anna', ['files'])}"}
    refused = order(client, text="a", headers=files_only)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "insufficient_permissions"
    assert order(client, text="b", headers=files_only).status_code == 403, "nothing is told of what the key belongs to"
    assert len(counter.effects) == 1


def test_an_invalid_body_frees_the_key(client: TestClient) -> None:
    assert client.post("/v1/orders", json=[], headers={"idempotency-key": "k"}).status_code == 400
    assert order(client, text="mended").status_code == 200


def test_streams_are_not_remembered(client: TestClient, counter: Counter) -> None:
    answers = [order(client, stream=True) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.json()["id"] for answer in answers] == counter.effects
    assert len(counter.effects) == 2


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\u00e9"])
def test_keys_are_plain(client: TestClient, counter: Counter, key: str) -> None:
    answer = client.post("/v1/orders", json={}, headers={"idempotency-key": key.encode("latin-1")})  # type: ignore[dict-item]
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_idempotency_key"
    assert counter.effects == []


def test_without_a_good_key_nothing_is_begun(client: TestClient, counter: Counter) -> None:
    assert order(client, headers={"authorization": "Bearer sk-ot-wrong"}).status_code == 401
    assert order(client).status_code == 200 and len(counter.effects) == 1


def test_a_dead_servers_request_is_taken_over_once(any_database_url: str) -> None:
    now = 1_800_000_000
    catalogue = Catalogue.open(any_database_url, lambda: now)
    rows, tenant = catalogue.idempotency, catalogue.tenants.create("anna").id
    dead = rows.begin(tenant, "k", "print", stale_s=3600)
    assert isinstance(dead, Begun)
    let_pass(any_database_url, "idempotency.begun_at", 3000)
    left = rows.begin(tenant, "k", "print", stale_s=3600)
    assert isinstance(left, Busy) and 0 < left.seconds <= 600
    assert rows.begin(tenant, "k", "another", stale_s=3600) == Reused()
    assert rows.hold(tenant, "k", dead.holder)
    let_pass(any_database_url, "idempotency.begun_at", 3000)
    assert isinstance(rows.begin(tenant, "k", "print", stale_s=3600), Busy), "it was held on to"
    let_pass(any_database_url, "idempotency.begun_at", 600)
    barrier = threading.Barrier(6)

    def take(_: int) -> object:
        barrier.wait()
        return rows.begin(tenant, "k", "print", stale_s=3600)

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(take, range(6)))
    (heir,) = [item for item in found if isinstance(item, Begun)]
    assert heir.nonce == dead.nonce and heir.holder != dead.holder
    assert all(isinstance(item, Busy) for item in found if item is not heir)
    rows.finish(tenant, "k", dead.holder, 200, "from the dead")
    assert not rows.hold(tenant, "k", dead.holder)
    assert isinstance(rows.begin(tenant, "k", "print"), Busy), "who was thought dead settles nothing"
    rows.finish(tenant, "k", heir.holder, 200, "done")
    assert rows.begin(tenant, "k", "print") == Answered(200, "done")
    now += 24 * 3600
    later = rows.begin(tenant, "k", "another")
    assert isinstance(later, Begun) and later.nonce != dead.nonce, "keys are remembered for a day"
    now += 24 * 3600
    rows.sweep()
    assert isinstance(rows.begin(tenant, "k", "third"), Begun)
    catalogue.close()


def test_every_post_of_the_service_takes_a_key(client_of: ClientOf) -> None:
    client = client_of("anna", SCOPES)
    paths = [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "post" in methods]
    assert len(paths) > 8
    for path in paths:
        place = re.sub(r"\{[^}]*\}", "x", path)
        sent = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "fine-tune"}} if path == "/v1/files" else {}
        answer = client.post(place, headers={"idempotency-key": "not a key"}, **sent)  # type: ignore[arg-type]
        assert answer.json()["error"]["code"] == "invalid_idempotency_key", (path, answer.text)
