"""The HTTP application over a real engine: OpenAI's bodies, statuses, headers and streams."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tiny_service import BASE, PLAIN_TEXT, Shelf, service_over
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.errors import StoreUnavailableError
from serve.api import create_api
from serve.engine.backend import LocalBackend
from serve.engine.generation import Chunk, GenerationEngine
from serve.engine.residency import PlugInCache
from serve.failures import BusyError
from serve.wire.completions import CompletionRequest

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


def test_requests_beyond_the_lanes_wait_their_turn_and_are_refused_in_time(engine: GenerationEngine) -> None:
    with TestClient(create_api(service_over(LocalBackend(engine, max_concurrent=1, wait_s=0.2)))) as client:
        slow = {**HELLO, "max_tokens": 100, "n": 4}
        statuses: list[int] = []
        first = threading.Thread(target=lambda: statuses.append(client.post("/v1/completions", json=slow).status_code))
        first.start()
        time.sleep(0.1)
        response = client.post("/v1/completions", json=HELLO)
        first.join()
    assert statuses == [200]
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert response.headers["retry-after"] == "2"


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

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        left = self._good_chunks
        async for chunk in super().complete(request):
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


def test_failure_in_the_middle_of_a_stream_is_an_event(engine: GenerationEngine) -> None:
    with TestClient(create_api(service_over(Broken(engine, 2, BusyError("no room"))))) as client:
        first, second, error = events(client)
    assert first["choices"][0]["text"]
    assert second["choices"][0]["text"]
    assert error["error"]["code"] == "overloaded"


def test_client_that_leaves_frees_its_lane(engine: GenerationEngine) -> None:
    backend = LocalBackend(engine, max_concurrent=1, wait_s=5)
    long = CompletionRequest.model_validate({**HELLO, "max_tokens": 120, "n": 8})

    async def leave_and_ask_again() -> float:
        chunks, waiting = backend.complete(long), backend.complete(long)
        await anext(chunks)
        # One that leaves while it waits for its turn is taken out of the queue.
        turn = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0.05)
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
        await chunks.aclose()
        begun = time.monotonic()
        async for _ in backend.complete(CompletionRequest.model_validate(HELLO)):
            pass
        return time.monotonic() - begun

    begun = time.monotonic()
    asyncio.run(_all(backend, long))
    whole = time.monotonic() - begun
    assert asyncio.run(leave_and_ask_again()) < whole / 3


async def _all(backend: LocalBackend, request: CompletionRequest) -> None:
    async for _ in backend.complete(request):
        pass
