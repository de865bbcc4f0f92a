"""The real Ray Serve application over HTTP, asked with OpenAI's own client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import ray
import torch
import yaml
from ray import serve as ray_serve
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema
from tiny_service import PLAIN_TEXT, PLAN, tokens_of, tuned_by, tuned_state
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.artifacts import Registry
from ot_ray.config import parse
from ot_ray.errors import ConfigError, LaunchError, PortInUseError
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import plug_in
from ot_ray.store import open_store
from serve.__main__ import main
from serve.app import build_app
from serve.config import ServeConfig
from serve.local import APPLICATION, run, shutdown
from tests.fixtures.s3 import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tenants(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, PreTrainedModel]]:
    """The URL of a store with two tenants' plug-ins, and what each should answer like, by id."""
    url = str(tmp_path_factory.mktemp("store"))
    registry, expected = Registry(open_store(url)), {}
    for seed, (model, tenant) in enumerate([("tiny", "anna"), ("tiny", "ben"), ("other", "carl")]):
        # One with modules of its own, of a seed that answers with letters.
        state = tuned_by(base, "bottleneck", 11) if tenant == "ben" else tuned_state(base, seed)
        record = registry.add(model, tenant, "tone", state, bundle_id="b-1", plan=PLAN, report={})
        registry.promote(record.model_id)
        if model == "tiny":
            expected[record.model_id] = plug_in(base, PLAN, state)
    return url, expected


@pytest.fixture(scope="module")
def config(checkpoint: Path, tenants: tuple[str, dict[str, PreTrainedModel]]) -> ServeConfig:
    values = {
        "model": {"name": "tiny", "source": str(checkpoint)},
        "store": tenants[0],
        "port": free_port(),
        "max_concurrent": 2,
        "max_choices": 128,
        "refresh_s": 0.1,
    }
    return parse(ServeConfig, values, "test")


@pytest.fixture(scope="module")
def url(local_ray: ClusterAddress, config: ServeConfig) -> Iterator[str]:
    yield run(config)
    shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    prompt = torch.tensor([tokens_of("Hello")])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16)
    return tokenizer.decode(made[0, 5:], skip_special_tokens=True)


def test_model_that_cannot_be_loaded_is_told_and_leaves_nothing(
    local_ray: ClusterAddress, config: ServeConfig, tmp_path: Path
) -> None:
    model = config.model.model_copy(update={"source": str(tmp_path)})
    with pytest.raises(LaunchError, match=rf"model.source is '{tmp_path}'"):
        run(config.model_copy(update={"model": model}))
    assert not ray_serve.status().applications


def test_models_are_those_of_this_base(client: openai.OpenAI, tenants: tuple[str, dict[str, PreTrainedModel]]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", *sorted(tenants[1])]
    for model_id in tenants[1]:
        assert client.models.retrieve(model_id).owned_by == model_id.split(":")[2]


def test_two_tenants_and_the_base_at_once(
    client: openai.OpenAI,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tenants: tuple[str, dict[str, PreTrainedModel]],
) -> None:
    expected = {model_id: greedy(model, tokenizer) for model_id, model in {"tiny": base, **tenants[1]}.items()}

    def ask(model_id: str) -> str:
        answer = client.completions.create(model=model_id, prompt="Hello", temperature=0, max_tokens=16)
        return answer.choices[0].text

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, [*expected] * 2))
    assert answers == [*expected.values()] * 2
    assert len(set(answers)) == 3


def test_streaming(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "seed": 4, "logit_bias": PLAIN_TEXT}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 6
    assert chunks[-1].usage == whole.usage


def test_errors_are_openais_classes(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.NotFoundError):
        next(iter(client.completions.create(model="gpt", prompt="x", stream=True)))
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="x", max_tokens=1000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=9)
    answers = [httpx.get(url + path) for path in ("/models", "/nowhere", "/completions")]
    assert [answer.status_code for answer in answers] == [200, 404, 405]
    assert all("," not in answer.headers["x-request-id"] for answer in answers)
    assert httpx.get(url.replace("/v1", "/healthz")).json() == {"status": "ok"}


def test_promotion_and_withdrawal_show_while_serving(
    client: openai.OpenAI, base: PreTrainedModel, config: ServeConfig
) -> None:
    assert config.store is not None
    registry = Registry(open_store(config.store))
    record = registry.add("tiny", "dora", "tone", tuned_state(base, 9), bundle_id="b-1", plan=PLAN, report={})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=record.model_id, prompt="x")
    registry.promote(record.model_id)
    time.sleep(0.2)
    assert client.completions.create(model=record.model_id, prompt="x").model == record.model_id
    registry.withdraw(record.model_id)
    time.sleep(0.2)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=record.model_id, prompt="x")


def test_clients_that_hang_up_free_their_rows(client: openai.OpenAI) -> None:
    engine = ray_serve.get_deployment_handle("Engine", APPLICATION)
    before = engine.stats.remote().result().tokens
    long = {"model": "tiny", "prompt": "x", "max_tokens": 120, "n": 128, "logit_bias": PLAIN_TEXT}
    streams = [client.completions.create(**long, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    # Both have choices that wait, and a third request gets its turn all the same.
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 60
    while (stats := engine.stats.remote().result()).rows or stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert stats.tokens - before < 2 * 128 * 120


def test_taken_port_or_ray_is_refused_and_the_service_goes_on(
    client: openai.OpenAI, config: ServeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PortInUseError, match=rf"127.0.0.1:{config.port}.*port="):
        run(config)
    assert main([f"port={config.port}", "model.name=tiny", "model.source=/tmp"]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1:{config.port}")
    with pytest.raises(LaunchError, match="already runs"):
        run(config.model_copy(update={"port": free_port()}))
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


def test_wrong_args_name_the_field() -> None:
    with pytest.raises(ConfigError, match=r"max_plugins; did you mean max_plug_ins\?"):
        build_app({"model": {"name": "tiny", "source": "x"}, "max_plugins": 3})


def test_cluster_file_is_what_serve_takes() -> None:
    written = yaml.safe_load((Path(__file__).parents[2] / "serve/configs/cluster.yaml").read_text())
    # Serve itself lets misspelt fields pass.
    assert written.keys() <= ServeDeploySchema.model_fields.keys()
    read = ServeDeploySchema.model_validate(written)
    (application,) = read.applications
    assert written["applications"][0].keys() <= ServeApplicationSchema.model_fields.keys()
    assert (application.name, application.import_path) == (APPLICATION, "serve.app:build_app")
    assert build_app(application.args)


def test_command_serves_until_interrupted(local_ray: ClusterAddress, config: ServeConfig, tmp_path: Path) -> None:
    shutdown()
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps(config.model_dump(exclude={"port"})))
    address, port = ray.get_runtime_context().gcs_address, free_port()
    command = [sys.executable, "-m", "serve", "--config", str(file), "--address", address, f"port={port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service:
        assert service.stderr is not None
        said = []
        for line in service.stderr:
            said.append(line)
            if "answers at" in line:
                break
        assert said[-1] == f"serve: tiny answers at http://127.0.0.1:{port}/v1; stop with Ctrl-C\n", said
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=30).status_code == 200
        service.send_signal(signal.SIGTERM)
        rest = service.stderr.read()
    assert service.returncode == 0, rest
    assert "Traceback" not in rest
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")
