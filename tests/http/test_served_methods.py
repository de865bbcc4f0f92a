"""Adapters of every tuning method from the customer's folder to an answer over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastapi.testclient import TestClient
from tiny_service import BASE, PLAIN_TEXT, PLAN, service_over, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.artifacts import Registry, inspect_adapter, open_bundle, plain_state, write_adapter, write_bundle
from ot_ray.model import METHODS, LoraSettings, adapter_state, emulate, plug_in, prepare_tuning
from ot_ray.store import open_store
from serve.api import create_api
from serve.engine.backend import LocalBackend
from serve.engine.generation import GenerationEngine
from serve.engine.plug_ins import RegistryPlugIns
from serve.engine.residency import PlugInCache


@pytest.fixture(scope="module")
def states(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What passed inspection, by method: every tensor that the method tunes was moved."""
    place = tmp_path_factory.mktemp("methods")
    emulated = emulate(base, PLAN, [0, 1])
    write_bundle(place / "bundle", emulated, None, PLAN, name=BASE, version="1", card="# Tiny\n", recommended={})
    bundle, found = open_bundle(place / "bundle"), {}
    for method in METHODS:
        generator = torch.Generator().manual_seed(len(method))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tuned = prepare_tuning(bundle.load_model(), PLAN, method, LoraSettings(rank=2))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        write_adapter(place / method, tuned, bundle.manifest, method=method, steps=1, learning_rate=1e-4)
        found[method] = plain_state(inspect_adapter(place / method, bundle.manifest), adapter_state(base, PLAN))
    return found


@pytest.fixture(scope="module")
def ids(states: dict[str, dict[str, torch.Tensor]], store: str) -> dict[str, str]:
    """The promoted plug-in of each method."""
    registry, promoted = Registry(open_store(store)), {}
    for method, state in states.items():
        record = registry.add(BASE, "acme", method, state, bundle_id="b-1", plan=PLAN, report={})
        registry.promote(record.model_id)
        promoted[method] = record.model_id
    return promoted


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def client(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: dict[str, str], store: str
) -> Iterator[TestClient]:
    cache = PlugInCache(BASE, base, RegistryPlugIns(Registry(open_store(store)), BASE), refresh_s=0)
    with TestClient(create_api(service_over(LocalBackend(GenerationEngine(tokenizer, cache))))) as client:
        yield client


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    prompt = torch.tensor([tokens_of("Hello")])
    made = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=16,
        # Letters alone, so that different tokens are different text.
        suppress_tokens=[int(token) for token in PLAIN_TEXT],
    )
    return tokenizer.decode(made[0, 5:], skip_special_tokens=True)


def ask(client: TestClient, model_id: str) -> str:
    body = {"model": model_id, "prompt": "Hello", "temperature": 0, "max_tokens": 16, "logit_bias": PLAIN_TEXT}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.mark.parametrize("method", METHODS)
def test_the_answer_is_that_of_the_model_plugged_in_here(
    client: TestClient,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    states: dict[str, dict[str, torch.Tensor]],
    ids: dict[str, str],
    method: str,
) -> None:
    before = greedy(base, tokenizer)
    answer = ask(client, ids[method])
    assert answer == greedy(plug_in(base, PLAN, states[method]), tokenizer)
    assert answer != before
    # The base beside it is as it was.
    assert ask(client, BASE) == before
