"""The HTTP application over a real engine: OpenAI's bodies, statuses, headers and streams."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from tiny_service import BASE, PLAIN_TEXT, Shelf, service_over
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.errors import StoreUnavailableError
from serve.api import create_api
from serve.engine.admission import BatchLimits
from serve.engine.backend import LocalBackend
from serve.engine.generation import GenerationEngine
from serve.engine.layout import Chunk
from serve.engine.residency import PlugInCache
from serve.failures import ApiError, BusyError
from serve.routes.health import Health
from serve.wire.base import Request
from serve.wire.chat import ChatRequest
from serve.wire.completions import CompletionRequest
from serve.wire.keys import KeyRequest
from serve.wire.offsite import AdapterRequest
from serve.wire.webhooks import WebhookRequest

HELLO = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "seed": 1, "logit_bias": PLAIN_TEXT}


@pytest.fixture
def client(engine: GenerationEngine) -> Iterator[TestClient]:
    with TestClient(create_api(service_over(LocalBackend(engine)))) as client:
        yield client


def events(client: TestClient, **fields: Any) -> list[Any]:
    with client.stream("POST", "/v1/completions", json={**HELLO, "stream": True, **fields}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def test_completion_has_openais_shape(client: TestClient) -> None:
    response = client.post("/v1/completions", json=HELLO)
    body = response.json()
    assert response.status_code == 200
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    [choice] = body["choices"]
    assert choice == {"index": 0, "text": choice["text"], "logprobs": None, "finish_reason": "length"}
    assert len(choice["text"]) == 8
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}


def test_stream_says_what_the_whole_answer_says(client: TestClient) -> None:
    fields = {**HELLO, "n": 2, "logprobs": 1, "stop": "zz"}
    whole = client.post("/v1/completions", json=fields).json()
    *chunks, usage, done = events(client, **fields, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1
    for choice in whole["choices"]:
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert len(pieces) > 2
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [choice["finish_reason"]]
        told = [token for piece in pieces if piece["logprobs"] for token in piece["logprobs"]["tokens"]]
        assert told == choice["logprobs"]["tokens"]
    assert all("usage" not in event for event in events(client)[:-1])


def test_models(client: TestClient, shelf: Shelf) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "ft:tiny:anna", "ft:tiny:ben"]
    assert client.get("/v1/models/ft:tiny:anna").json() == {
        "id": "ft:tiny:anna",
        "object": "model",
        "created": 1700000000,
        "owned_by": "anna",
    }
    del shelf.states["ft:tiny:anna"]
    assert client.get("/v1/models/ft:tiny:anna").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_model_is_openais_404(client: TestClient, stream: bool) -> None:
    response = client.post("/v1/completions", json={**HELLO, "model": "gpt", "stream": stream})
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "The model `gpt` does not exist or you do not have access to it.",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        }
    }
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "0.5"}, "temperature", "'0.5'"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"prompt": []}, "prompt", "a prompt is"),
        ({"prompt": ["a", 1]}, "prompt", "a prompt is"),
        ({"prompt": [[1], []]}, "prompt", "a prompt is"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "not empty"),
        ({"logprobs": 6}, "logprobs", "5"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "pattern"),
        ({"messages": [], "tools": []}, "messages", "Unrecognized request arguments supplied: messages, tools"),
        ({"foo": 1}, "foo", "Unrecognized request argument supplied: foo"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "stream_options.x"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"model": None}, "model", "Missing required parameter: 'model'"),
    ],
)
def test_invalid_requests_name_the_parameter(
    client: TestClient, fields: dict[str, Any], param: str, words: str
) -> None:
    response = client.post("/v1/completions", json={**HELLO, **fields})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert response.headers["x-should-retry"] == "false"


def test_null_and_neutral_values_are_accepted(client: TestClient) -> None:
    nulls = dict.fromkeys(["suffix", "best_of", "stop", "logprobs", "user", "presence_penalty", "stream_options"])
    neutral = {"suffix": "", "best_of": 1, "user": "someone", "presence_penalty": 0, "echo": False, "n": 1}
    whole = [client.post("/v1/completions", json={**HELLO, **fields}) for fields in ({}, nulls, neutral)]
    assert [response.status_code for response in whole] == [200, 200, 200]
    assert len({response.json()["choices"][0]["text"] for response in whole}) == 1


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'"text"', b"\xff\xfe"])
def test_bodies_that_are_no_json_object(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_paths_and_methods(client: TestClient) -> None:
    unknown = client.get("/v1/engines")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    wrong = client.get("/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_supported")
    assert wrong.headers["allow"] == "POST"
    assert "POST" in wrong.json()["error"]["message"]


def test_large_bodies_are_refused_with_and_without_a_stated_length(client: TestClient) -> None:
    large = json.dumps({**HELLO, "prompt": "x" * 60_000}).encode()
    for content in (large, iter([large[:30_000], large[30_000:]])):
        response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert "50000 bytes" in response.json()["error"]["message"]


def test_every_answer_has_a_request_id(client: TestClient) -> None:
    ids = [client.get(path).headers["x-request-id"] for path in ("/healthz", "/nowhere", "/v1/models")]
    assert len(set(ids)) == 3
    assert client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/healthz", headers={"x-request-id": "no spaces"}).headers["x-request-id"].startswith("req_")


@contextmanager
def held(engine: GenerationEngine) -> Iterator[threading.Semaphore]:
    """The model makes a pass for each permit, and waits for the next one."""
    permits = threading.Semaphore(0)

    def wait(*_: object) -> None:
        permits.acquire(timeout=60)

    hook = engine._cache.many.model.register_forward_pre_hook(wait)
    try:
        yield permits
    finally:
        hook.remove()
        permits.release(10_000)


def test_requests_beyond_the_rows_wait_their_turn_and_are_refused_in_time(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf
) -> None:
    engine = GenerationEngine(tokenizer, PlugInCache(BASE, base, shelf), limits=BatchLimits(rows=1), wait_s=0.2)
    with (
        TestClient(create_api(service_over(LocalBackend(engine, wait_s=0.2)))) as client,
        ThreadPoolExecutor(1) as side,
    ):
        slow = {**HELLO, "max_tokens": 50}
        with held(engine) as permits:
            first = side.submit(client.post, "/v1/completions", json=slow)
            permits.release(10)
            wait_until(lambda: engine.stats().tokens == 10)
            response = client.post("/v1/completions", json=HELLO)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "overloaded"
            assert response.headers["retry-after"] == "2"
        assert first.result(60).status_code == 200
        assert client.post("/v1/completions", json=HELLO).status_code == 200


def test_more_than_may_wait_are_refused_and_one_asker_leaves_room_for_others(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf
) -> None:
    limits = BatchLimits(rows=1, waiting=8)
    engine = GenerationEngine(tokenizer, PlugInCache(BASE, base, shelf), limits=limits)
    request = CompletionRequest.model_validate({**HELLO, "n": 2, "max_tokens": 1})
    told: list[object] = []
    with held(engine) as permits:
        tickets = [engine.submit(engine.prepare(request), told.append, "anna") for _ in range(7)]
        with pytest.raises(ApiError, match="try again later") as refused:
            engine.submit(engine.prepare(request), told.append, "anna")
        assert refused.value.status == 429
        assert refused.value.retry_after_s
        tickets.append(engine.submit(engine.prepare(request), lambda _: told.append("ben"), "ben"))
        permits.release(3)
        # Ben came last and is answered before anna's second request.
        wait_until(lambda: "ben" in told)
    wait_until(lambda: all(ticket.over for ticket in tickets))
    assert engine.stats().waiting == 0


def test_health_is_told_between_two_tokens_of_a_busy_engine(engine: GenerationEngine) -> None:
    with TestClient(create_api(service_over(LocalBackend(engine)))) as client, ThreadPoolExecutor(9) as side:
        long = {**HELLO, "max_tokens": 120, "n": 8}
        answers = [side.submit(client.post, "/v1/completions", json=long) for _ in range(8)]
        wait_until(lambda: engine.stats().rows > 8)
        assert client.get("/healthz").json() == {"status": "ok"}
        assert engine.stats().rows + engine.stats().waiting > 0
        assert [answer.result(120).status_code for answer in answers] == [200] * 8


def test_a_broken_adapter_fails_its_own_requests_alone(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    shelf = Shelf(base, ["nan", "torn", "anna"])
    for tensor in shelf.states["ft:tiny:nan"].values():
        tensor.fill_(float("nan"))
    del shelf.states["ft:tiny:torn"]["layers.0.fc1.weight"]
    engine = GenerationEngine(tokenizer, PlugInCache(BASE, base, shelf))
    with TestClient(create_api(service_over(LocalBackend(engine)))) as client, ThreadPoolExecutor(8) as side:
        names = ["tiny", "ft:tiny:nan", "ft:tiny:torn", "ft:tiny:anna"]
        alone = {name: client.post("/v1/completions", json={**HELLO, "model": name}).json() for name in names}
        bodies = [{**HELLO, "model": name} for name in names * 3]
        answers = list(side.map(lambda body: client.post("/v1/completions", json=body), bodies))
        for name, answer in zip(names * 3, answers, strict=True):
            if name in ("tiny", "ft:tiny:anna"):
                assert answer.json()["choices"] == alone[name]["choices"]
            else:
                assert answer.status_code == 500
                assert answer.json()["error"]["type"] == "server_error"
        assert "not finite" in alone["ft:tiny:nan"]["error"]["message"]
        assert client.get("/healthz").status_code == 200


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_registry_that_never_answered_is_a_503_for_plug_ins_only(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf
) -> None:
    shelf.error = StoreUnavailableError("s3://secret-bucket does not answer")
    engine = GenerationEngine(tokenizer, PlugInCache(BASE, base, shelf))
    with TestClient(create_api(service_over(LocalBackend(engine)))) as client:
        response = client.post("/v1/completions", json={**HELLO, "model": "ft:tiny:anna"})
        assert response.status_code == 503
        assert "secret" not in response.text
        assert response.headers["retry-after"]
        assert client.post("/v1/completions", json=HELLO).status_code == 200


class Broken(LocalBackend):
    """A backend that breaks after some chunks, as an engine whose device fails does."""

    def __init__(self, engine: GenerationEngine, good_chunks: int, error: Exception) -> None:
        super().__init__(engine)
        self._good_chunks, self._error = good_chunks, error

    async def complete(self, request: CompletionRequest, asker: str = "") -> AsyncGenerator[Chunk, None]:
        left = self._good_chunks
        async for chunk in super().complete(request, asker):
            if left == 0:
                raise self._error
            left -= 1
            yield chunk

    async def check_ready(self) -> None:
        raise self._error


def test_failures_tell_no_secrets(engine: GenerationEngine) -> None:
    with TestClient(create_api(service_over(Broken(engine, 0, RuntimeError("secret at /home"))))) as client:
        for stream in (False, True):
            response = client.post("/v1/completions", json={**HELLO, "stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text
            assert response.headers["x-request-id"].startswith("req_")
        health = client.get("/healthz")
        assert health.status_code == 503
        assert "secret" not in health.text


class Counting(LocalBackend):
    """A backend that counts how often it is asked whether it can answer."""

    asked, good = 0, True

    async def check_ready(self) -> None:
        self.asked += 1
        await asyncio.sleep(0.01)
        if not self.good:
            raise RuntimeError("no device")


def test_health_is_asked_once_for_all_who_ask(engine: GenerationEngine) -> None:
    async def run() -> None:
        backend = Counting(engine)
        health = Health(backend, fresh_s=3600)
        assert await asyncio.gather(*(health.good() for _ in range(50))) == [True] * 50
        assert await health.good() and backend.asked == 1
        changing = Health(backend, fresh_s=0)
        assert await changing.good()
        backend.good = False
        assert not await changing.good() and backend.asked == 3
        leaver = asyncio.create_task(changing.good())
        await asyncio.sleep(0)
        stayer = asyncio.create_task(changing.good())
        await asyncio.sleep(0)
        leaver.cancel()
        assert await stayer is False and backend.asked == 4

    asyncio.run(run())


MANY = 20_000
NOTHING = [0] * MANY
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ChatRequest, {"messages": NOTHING}),
        (ChatRequest, {"messages": [0] * 2000}),
        (ChatRequest, {"messages": [{"role": "user", "content": NOTHING}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * 200}] * 20}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 200}] * 50}),
        (ChatRequest, {"messages": MESSAGES * 3000}),
        (ChatRequest, {"messages": MESSAGES, "logit_bias": {f"x{number}": 0 for number in range(MANY)}}),
        (ChatRequest, {"messages": MESSAGES, "metadata": {f"x{number}": 0 for number in range(MANY)}}),
        (CompletionRequest, {"prompt": [[1]] * MANY}),
        (CompletionRequest, {"prompt": ["a"] * MANY}),
        (CompletionRequest, {"prompt": [["a"]] * MANY}),
        (CompletionRequest, {"logit_bias": {f"x{number}": 0 for number in range(MANY)}}),
        (KeyRequest, {"scopes": NOTHING}),
        (WebhookRequest, {"event_types": NOTHING}),
        (AdapterRequest, {"files": NOTHING}),
    ],
)
def test_many_bad_items_are_told_as_one(kind: type[Request], fields: dict[str, Any]) -> None:
    """An error for each costs a thousand times what the body did."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "tiny", **fields})
    assert sum(error["loc"][0] in fields for error in caught.value.errors()) <= 2


def test_many_unknown_fields_are_told_as_one(client: TestClient) -> None:
    response = client.post("/v1/completions", json={**HELLO, **{f"x{number}": 0 for number in range(200)}})
    assert response.status_code == 400
    assert f"{200 + len(HELLO)} arguments" in response.json()["error"]["message"]


def test_failure_in_the_middle_of_a_stream_is_an_event(engine: GenerationEngine) -> None:
    with TestClient(create_api(service_over(Broken(engine, 2, BusyError("no room"))))) as client:
        first, second, error = events(client)
    assert first["choices"][0]["text"]
    assert second["choices"][0]["text"]
    assert error["error"]["code"] == "overloaded"


def test_client_that_leaves_frees_its_row(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf
) -> None:
    engine = GenerationEngine(tokenizer, PlugInCache(BASE, base, shelf), limits=BatchLimits(rows=1))
    backend = LocalBackend(engine)
    long = CompletionRequest.model_validate({**HELLO, "max_tokens": 120, "n": 8, "stream": True})

    async def leave_and_ask_again() -> int:
        chunks, waiting = backend.complete(long), backend.complete(long)
        await anext(chunks)
        # One that leaves while it waits for its turn is taken out of the queue.
        turn = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0.05)
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
        await chunks.aclose()
        before = engine.stats().tokens
        async for _ in backend.complete(CompletionRequest.model_validate(HELLO)):
            pass
        return engine.stats().tokens - before

    # Its own eight tokens, and at most two that were begun when the others left.
    assert asyncio.run(leave_and_ask_again()) <= 10
    wait_until(lambda: engine.stats().rows == engine.stats().waiting == 0)
