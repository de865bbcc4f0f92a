"""The serving benchmark at a tiny size: both sides answer the same text, and every figure is there."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.benchmarks.serving import ServingBenchmark, run, table
from jobs.benchmarks.serving_load import Load, drive, figures
from jobs.benchmarks.serving_scene import build_scene, prompts
from ot_ray.artifacts import Registry
from ot_ray.errors import LaunchError, SplitError
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import ModelConfig, SplitPlan
from ot_ray.store import open_store

BASE = Path(__file__).parents[2] / "jobs/base"
SMALL = {"tenants": [1, 3], "requests": 2, "repeats": 1, "prompt_tokens": 5, "max_tokens": 4}
ROWS = [(1, "cold"), (1, "warm"), (3, "cold"), (3, "warm")]


def test_one_side_alone_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "found.json"
    found = run(ServingBenchmark.model_validate({**SMALL, "sides": ["plain"], "output": str(kept)}))
    assert found == json.loads(kept.read_text())
    assert [(row["tenants"], row["adapter"]) for row in found["results"]] == ROWS
    for row in found["results"]:
        assert row["side"] == "plain" and row["requests_per_s"] > 0 and row["memory_bytes"] > 0
        assert 0 < row["first_token_ms"] <= row["first_token_ms_p95"]
        assert len(row["tokens_per_s_runs"]) == 1
    assert "| 3 | plain | warm |" in capsys.readouterr().err


@pytest.mark.slow
def test_both_sides_say_the_same(local_ray: ClusterAddress) -> None:
    results = run(ServingBenchmark.model_validate({**SMALL, "tenants": [3]}))["results"]
    assert {(row["side"], row["adapter"]) for row in results} == {
        (side, adapter) for side in ("service", "plain") for adapter in ("cold", "warm")
    }
    assert all(row["tokens_per_s"] > 0 and row["memory_bytes"] > 0 for row in results)
    assert results[-1]["same_text"] == 1.0


def test_the_scenes_plug_ins_are_its_whole_models(tmp_path: Path) -> None:
    plan = SplitPlan(bottom=1, keep=2, top=1)
    scene = build_scene(ModelConfig(name="base", source=str(BASE)), plan, 6, tmp_path)
    registry = Registry(open_store(scene.registry))
    assert sorted(record.model_id for record in registry.current()) == sorted(scene.models)
    asked = torch.tensor(prompts(1, 8, 2048))
    logits = []
    for model_id, folder in scene.models.items():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        state = registry.load_state(model_id)
        own = whole.state_dict()
        for name, tensor in state.items():
            layer, _, leaf = name.removeprefix("layers.").partition(".")
            full = int(layer) if int(layer) < plan.bottom else int(layer) + 10 - plan.depth
            assert torch.equal(own[f"model.decoder.layers.{full}.{leaf}"], tensor.float())
        logits.append(whole(asked).logits)
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[4])
    assert AutoTokenizer.from_pretrained(folder).decode([100])


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers what `script` says, one entry a request: a status, headers and a body."""

    protocol_version = "HTTP/1.1"
    script: list[tuple[int, dict[str, str], bytes]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, headers, body = self.script.pop(0)
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[tuple[str, list[tuple[int, dict[str, str], bytes]]]]:
    script: list[tuple[int, dict[str, str], bytes]] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Scripted", (_Server,), {"script": script}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", script
    server.shutdown()
    thread.join()
    server.server_close()


def stream(*events: dict[str, object]) -> bytes:
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"


LOAD = Load([[5, 6]], max_tokens=2, timeout_s=60)


def test_load_tries_again_as_it_is_told_and_counts_what_it_got(scripted) -> None:
    url, script = scripted
    whole = stream(
        {"choices": [{"index": 0, "text": "a"}]},
        {"choices": [{"index": 0, "text": "b"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    )
    script += [(429, {"retry-after": "0"}, b"{}"), (503, {"retry-after": "0"}, b"{}"), (200, {}, whole)]
    seconds, [answer] = drive(url, ["m"], LOAD)
    assert (answer.model, answer.text, answer.tokens, answer.retries) == ("m", "ab", 2, 2)
    assert 0 < answer.first_s <= answer.whole_s <= seconds
    found = figures(2.0, [answer, answer])
    assert (found["requests_per_s"], found["tokens_per_s"], found["retries"]) == (1.0, 2.0, 4)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, {}, b'{"error": "no"}'), "answered 400 to m"),
        ((200, {}, stream({"error": {"message": "lost"}})), "broke off its answer to m: lost"),
        ((200, {}, stream({"choices": [{"index": 0, "text": "a"}]})), "without a count"),
    ],
)
def test_load_that_fails_is_no_figure(scripted, answer, said: str) -> None:
    url, script = scripted
    script.append(answer)
    with pytest.raises(LaunchError, match=said):
        drive(url, ["m"], LOAD)


def test_table_is_markdown() -> None:
    row = {"tenants": 8, "side": "service", "adapter": "cold", "requests_per_s": 2.0, "tokens_per_s": 64.4}
    row |= {"first_token_ms": 12.3, "first_token_ms_p95": 40.1, "tokens_per_s_runs": [60.2, 70.7]}
    lines = table([{**row, "memory_bytes": 2**30}, {**row, "memory_bytes": None}]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| 8 | service | cold | 2.0 | 64 (60 to 71) | 12 ms (40) | 1.00 GiB |"
    assert lines[3].endswith("| not known |")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tenants is \[0\]"):
        ServingBenchmark(tenants=[0])
    with pytest.raises(SplitError, match="layers"):
        run(ServingBenchmark(split=SplitPlan(bottom=9, keep=1, top=9), sides=["plain"]))
