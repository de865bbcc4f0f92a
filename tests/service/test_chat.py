"""Chats and models over HTTP, with keys: OpenAI's shapes by OpenAI's own types, and what is whose."""

from __future__ import annotations

import json
from typing import Any

import anyio
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.artifacts import Registry
from ot_ray.data import render
from ot_ray.store import LocalStore
from serve.engine.admission import BatchLimits
from serve.engine.backend import LocalBackend
from serve.engine.generation import GenerationEngine
from serve.engine.plug_ins import NoPlugIns
from serve.engine.residency import PlugInCache
from serve.failures import ApiError
from serve.service import Service
from serve.wire.chat import ChatRequest
from serve.wire.completions import CompletionRequest
from tests.http.tiny_service import BASE, CONTEXT, PLAIN_TEXT, PLAN, tuned_state
from tests.service.conftest import ClientOf

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}]
HELLO = {"model": BASE, "messages": MESSAGES, "max_tokens": 8, "seed": 1, "logit_bias": PLAIN_TEXT}


@pytest.fixture
def client(client_of: ClientOf) -> TestClient:
    return client_of("anna")


def chat(client: TestClient, **fields: Any) -> Any:
    response = client.post("/v1/chat/completions", json={**HELLO, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events(client: TestClient, **fields: Any) -> list[Any]:
    response = client.post("/v1/chat/completions", json={**HELLO, "stream": True, **fields})
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_an_answer_is_openais_and_continues_what_training_lays_out(
    client: TestClient, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = ChatCompletion.model_validate(chat(client), strict=True)
    prompt = render(MESSAGES, tokenizer, reply=True)
    assert prompt == "System:\nBe kind.\n\nUser:\nHi!\n\nAssistant:\n"
    same = {key: HELLO[key] for key in ("model", "max_tokens", "seed", "logit_bias")}
    plain = client.post("/v1/completions", json={**same, "prompt": prompt}).json()
    [choice] = answer.choices
    assert choice.message.content == plain["choices"][0]["text"]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert answer.usage.to_dict() == plain["usage"]
    assert answer.model == BASE


def test_a_stream_says_what_the_whole_answer_says(client: TestClient) -> None:
    fields = {"n": 2, "logprobs": True, "top_logprobs": 2, "stop": "zz", "max_tokens": 12}
    whole = ChatCompletion.model_validate(chat(client, **fields), strict=True)
    sent = events(client, **fields, stream_options={"include_usage": True})
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in sent]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert parts[0].delta.to_dict() == {"role": "assistant", "content": ""}
        assert len(parts) > 4
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        assert parts[-1].delta.to_dict() == {}
        told = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [item.token for item in told] == [item.token for item in choice.logprobs.content]
        expected = [item.logprob for item in choice.logprobs.content]
        assert [item.logprob for item in told] == pytest.approx(expected, abs=1e-4)
    assert all("usage" not in event for event in events(client))


def test_logprobs_are_those_of_completions(client: TestClient, tokenizer: PreTrainedTokenizerFast) -> None:
    answer = ChatCompletion.model_validate(chat(client, logprobs=True, top_logprobs=3), strict=True)
    same = {key: HELLO[key] for key in ("model", "max_tokens", "seed", "logit_bias")}
    prompt = render(MESSAGES, tokenizer, reply=True)
    plain = client.post("/v1/completions", json={**same, "prompt": prompt, "logprobs": 3}).json()
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [item.token for item in logprobs.content] == plain["choices"][0]["logprobs"]["tokens"]
    expected = plain["choices"][0]["logprobs"]["token_logprobs"]
    assert [item.logprob for item in logprobs.content] == pytest.approx(expected, abs=1e-4)
    for item in logprobs.content:
        assert bytes(item.bytes or b"").decode() == item.token
        assert len(item.top_logprobs) == 3
        assert sorted((top.logprob for top in item.top_logprobs), reverse=True) == [
            top.logprob for top in item.top_logprobs
        ]
    assert chat(client)["choices"][0]["logprobs"] is None
    without = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [item["top_logprobs"] for item in without] == [[]] * 8


def test_contents_and_limits(client: TestClient) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]
    whole = [{"role": "user", "content": "Hi!", "name": "anna"}]
    assert chat(client, messages=parts)["choices"] == chat(client, messages=whole)["choices"]
    assert chat(client, max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    # Without a limit the answer may be as long as the context.
    assert chat(client, max_tokens=None)["usage"]["total_tokens"] == CONTEXT
    stopped = chat(client, max_tokens=None, logit_bias={"1": 100})["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("", "stop")
    neutral = {"tools": [], "response_format": {"type": "text"}, "store": False, "service_tier": "auto", "user": "u"}
    assert chat(client, **neutral)["choices"] == chat(client)["choices"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported: this service has no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no output formats other than text"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "Missing required parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "string"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, None, "maximum context length"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "include_obfuscation"),
        ({"max_completion_tokens": 9}, "max_tokens", "send one of them"),
        ({"n": 9}, "n", "9 choices"),
        ({"foo": 1}, "foo", "Unrecognized"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str | None, words: str
) -> None:
    content = json.dumps({**HELLO, **fields})
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("place", "kind", "params"),
    [
        ("chat/completions", ChatRequest, chat_params.CompletionCreateParamsStreaming),
        ("completions", CompletionRequest, completion_params.CompletionCreateParamsStreaming),
    ],
)
def test_every_parameter_of_openais_client_is_taken_or_refused_by_name(
    client: TestClient, place: str, kind: type[BaseModel], params: type
) -> None:
    needed = {"messages": MESSAGES} if kind is ChatRequest else {"prompt": "x"}
    absent = sorted(params.__required_keys__.union(params.__optional_keys__) - kind.model_fields.keys())
    assert not absent or kind is ChatRequest
    for name in absent:
        response = client.post(f"/v1/{place}", json={"model": BASE, **needed, name: ["asked for"]})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('The user begins.') }}", "The user begins."),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_the_requests_error(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, template: str, words: str
) -> None:
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", pad_token="<pad>")
    own.chat_template = template
    engine = GenerationEngine(own, PlugInCache(BASE, base, NoPlugIns()))
    with pytest.raises(ApiError, match=words) as caught:
        engine.prepare_chat(ChatRequest.model_validate(HELLO))
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_the_tokenizers_own_template_is_used(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", pad_token="<pad>")
    own.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    engine = GenerationEngine(own, PlugInCache(BASE, base, NoPlugIns()), limits=BatchLimits(rows=2))
    assert engine.prepare_chat(ChatRequest.model_validate(HELLO)).texts == ["[system]Be kind.[user]Hi!>"]


def test_a_template_that_says_nothing_begins_a_document(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", pad_token="<pad>")
    own.chat_template = "{% for m in messages %}{% endfor %}"
    engine = GenerationEngine(own, PlugInCache(BASE, base, NoPlugIns()))
    assert engine.prepare_chat(ChatRequest.model_validate(HELLO)).prompts == [[own.eos_token_id]]


@pytest.fixture
def tuned(store: LocalStore, base: PreTrainedModel) -> dict[str, str]:
    """The ids of a model that anna and ben each have, and of an earlier one of anna's."""
    registry, ids = Registry(store), {}
    for seed, (name, tenant) in enumerate([("before", "anna"), ("anna", "anna"), ("ben", "ben")]):
        state = tuned_state(base, seed)
        record = registry.add(BASE, tenant, "tone", state, bundle_id="b-1", plan=PLAN, report={})
        registry.promote(record.model_id)
        ids[name] = record.model_id
    return ids


def test_models_are_the_base_and_ones_own(tuned: dict[str, str], serving_client_of: ClientOf) -> None:
    anna, ben = serving_client_of("anna"), serving_client_of("ben")
    listed = [card["id"] for card in anna.get("/v1/models").json()["data"]]
    assert listed == [BASE, *sorted((tuned["before"], tuned["anna"]))]
    assert [card["id"] for card in ben.get("/v1/models").json()["data"]] == [BASE, tuned["ben"]]
    alias = f"ft:{BASE}:anna:tone"
    for name in (BASE, tuned["anna"], tuned["before"], alias):
        assert anna.get(f"/v1/models/{name}").json()["id"] == name

    def answer(name: str) -> str:
        return chat(anna, model=name)["choices"][0]["message"]["content"]

    assert answer(alias) == answer(tuned["anna"])
    assert len({answer(name) for name in (BASE, tuned["anna"], tuned["before"])}) == 3


def test_another_tenants_model_is_one_that_does_not_exist(tuned: dict[str, str], serving_client_of: ClientOf) -> None:
    anna = serving_client_of("anna")
    unknown = [
        f"ft:{BASE}:anna:tone:{'0' * 12}",
        f"ft:{BASE}:ben:tone:{'0' * 12}",
        "gpt-4",
        "ft:::",
        "ft:tiny:anna:none",
    ]
    for name in [*unknown, tuned["ben"], f"ft:{BASE}:ben:tone", f"ft:other:anna:tone:{'0' * 12}"]:
        asked = [
            anna.get(f"/v1/models/{name}"),
            anna.post("/v1/chat/completions", json={**HELLO, "model": name}),
            anna.post("/v1/completions", json={"model": name, "prompt": "x"}),
            anna.post("/v1/completions", json={"model": name, "prompt": "x", "stream": True}),
        ]
        if name.count(":") == 4 or not name.startswith("ft:"):
            asked.append(anna.delete(f"/v1/models/{name}"))
        for response in asked:
            assert response.status_code == 404
            assert response.json()["error"] == {
                "message": f"The model `{name}` does not exist or you do not have access to it.",
                "type": "invalid_request_error",
                "param": None,
                "code": "model_not_found",
            }
    assert tuned["ben"] in serving_client_of("ben").get("/v1/models").text


def test_a_model_can_be_deleted_by_its_owner_alone(tuned: dict[str, str], serving_client_of: ClientOf) -> None:
    anna = serving_client_of("anna")
    asking = serving_client_of("anna", scopes=("inference",))
    assert asking.delete(f"/v1/models/{tuned['anna']}").status_code == 403
    assert anna.delete(f"/v1/models/{BASE}").status_code == 403
    assert anna.delete(f"/v1/models/ft:{BASE}:anna:tone").status_code == 400
    gone = anna.delete(f"/v1/models/{tuned['anna']}")
    assert gone.json() == {"id": tuned["anna"], "object": "model", "deleted": True}
    for name in (tuned["anna"], f"ft:{BASE}:anna:tone"):
        assert anna.post("/v1/chat/completions", json={**HELLO, "model": name}).status_code == 404
    assert anna.delete(f"/v1/models/{tuned['anna']}").status_code == 404
    assert anna.get(f"/v1/models/{tuned['before']}").status_code == 200


def test_keys_without_the_scope_and_no_key(client_of: ClientOf) -> None:
    assert client_of("anna", scopes=("files",)).post("/v1/chat/completions", json=HELLO).status_code == 403
    assert client_of(None).post("/v1/chat/completions", json=HELLO).status_code == 401
    assert client_of(None).get("/v1/models").status_code == 401


def test_an_idempotency_key_gives_the_same_answer_again(client: TestClient) -> None:
    headers = {"idempotency-key": "once"}
    body = {**HELLO, "seed": None}
    first, second = (client.post("/v1/chat/completions", json=body, headers=headers) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["idempotency-replayed"] == "true"


@pytest.fixture
def sdk(client: TestClient) -> openai.OpenAI:
    key = client.headers["authorization"].removeprefix("Bearer ")
    return openai.OpenAI(base_url="http://testserver/v1", api_key=key, max_retries=0, http_client=client)


def test_openais_own_client_chats(sdk: openai.OpenAI) -> None:
    fields: dict[str, Any] = {key: value for key, value in HELLO.items() if key != "messages"}
    whole = sdk.chat.completions.create(messages=MESSAGES, **fields)  # type: ignore[arg-type]
    with sdk.chat.completions.create(messages=MESSAGES, stream=True, **fields) as stream:  # type: ignore[arg-type]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(messages=MESSAGES, **{**fields, "model": "gpt-4"})  # type: ignore[arg-type]
    assert [model.id for model in sdk.models.list()] == [BASE]


async def canary(service: Service, model_id: str) -> Any:
    return await service.backend.canary(model_id)


def test_a_canary_compares_with_the_base_before_promotion(
    serving: Service, store: LocalStore, base: PreTrainedModel
) -> None:
    assert isinstance(serving.backend, LocalBackend)
    registry, reports = Registry(store), []
    same = {name: tensor.clone() for name, tensor in tuned_state(base, 0).items()}
    for name, tensor in same.items():
        position = {"0": 0, "3": 5}[name.split(".")[1]]
        tensor.copy_(base.model.decoder.layers[position].state_dict()[name.split(".", 2)[2]])
    broken = {name: torch.full_like(tensor, float("inf")) for name, tensor in same.items()}
    for state in (same, tuned_state(base, 1), broken):
        record = registry.add(BASE, "anna", "tone", state, bundle_id="b-1", plan=PLAN, report={})
        reports.append(anyio.run(canary, serving, record.model_id))
    assert (reports[0].finite, reports[0].ratio) == (True, 1.0)
    assert reports[1].finite
    assert reports[1].ratio > 1.05
    assert not reports[2].finite
