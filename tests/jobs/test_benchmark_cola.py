"""The gradient learning benchmark at a tiny size: every side does the same work as LoRA, and is held against it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.benchmarks import cola_memory, cola_offload, cola_side
from jobs.benchmarks.cola import ColaBenchmark, table
from jobs.benchmarks.cola_side import SideConfig
from jobs.benchmarks.shapes import SHAPES
from ot_ray.config import load
from ot_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]


def side(name: str, customers: int = 3, **changed: object) -> SideConfig:
    given = {
        "side": name,
        "shape": SHAPES["tiny"],
        "device": "cpu",
        "precision": "float32",
        "customers": customers,
        "rows": 2,
        "rank": 4,
        "sites": ("*.q_proj", "*.fc1"),
        "workers": 0,
        "staleness": 0,
        "steps": 3,
        "warmup": 1,
    }
    return SideConfig.model_validate({**given, **changed})


def test_sides_train_alike() -> None:
    losses = {name: cola_side.measure(side(name))["losses"] for name in ("LoRA", "unmerged", "offloaded", "merged")}
    assert len(losses["LoRA"]) == 4
    # The same tokens, the same start, the same optimiser: four steps of two independent loops.
    for name in ("unmerged", "offloaded"):
        assert losses[name] == pytest.approx(losses["LoRA"], rel=1e-5)
    # The mean of three is another model, from its first fit on.
    assert losses["merged"][0] == pytest.approx(losses["LoRA"][0], rel=1e-5)
    assert abs(losses["merged"][3] / losses["LoRA"][3] - 1) > 1e-6
    # One customer's mean is its own.
    alone, merged = (cola_side.measure(side(name, customers=1))["losses"] for name in ("LoRA", "merged"))
    assert merged == pytest.approx(alone, rel=1e-5)


def test_memory_of_the_server_does_not_grow_with_customers() -> None:
    factors = 6 * 4 * (2 * 32 + 32 + 128) * 4  # layers, rank, the maps' sizes, bytes
    found = {
        name: {count: cola_memory.measure(side(name, customers=count, rows=8 // count)) for count in (1, 8)}
        for name in ("merged", "unmerged", "offloaded")
    }
    for name in ("merged", "offloaded"):
        few, many = (found[name][count] for count in (1, 8))
        assert (few["host_bytes"], many["host_bytes"]) == (factors, 8 * factors)
        assert many["server_bytes"] < 1.02 * few["server_bytes"]
    few, many = (found["unmerged"][count]["server_bytes"] for count in (1, 8))
    assert many - few >= 7 * factors
    # The trace sees what a pass holds: more of it for more rows.
    longer = cola_memory.measure(side("offloaded", customers=8, rows=2))
    assert longer["server_bytes"] > 1.2 * found["offloaded"][8]["server_bytes"]


def test_the_trace_counts_what_is_held_at_once() -> None:
    def made() -> None:
        for _ in range(3):
            torch.zeros(1000, 1000).add_(1)
        both = [torch.zeros(1000, 1000), torch.zeros(500, 1000)]
        assert len(both) == 2

    assert 6_000_000 <= cola_memory.allocated(made) < 6_100_000


@pytest.mark.slow
@pytest.mark.timeout(900)  # four processes that load PyTorch, on a machine with other things to do
def test_the_command_compares_sides(tmp_path: Path) -> None:
    kept = tmp_path / "found.json"
    settings = ["shapes=[tiny]", "sides=[LoRA, offloaded]", "customers=[2]", "customers_per_worker=0"]
    settings.append("customer_device={bandwidth: 1e7, speed: 0.5}")
    command = [sys.executable, "-m", "jobs.benchmark", "cola", *settings, "steps=1", "warmup=1", "repeats=1"]
    done = subprocess.run(
        [*command, f"output={kept}"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=840
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(kept.read_text())
    result = found["results"]["tiny"]
    sides = result["throughput"]["2"]
    assert {*sides} == {"LoRA", "offloaded"}
    ratio = sides["offloaded"]["tokens_per_s"] / sides["LoRA"]["tokens_per_s"]
    assert result["ratios"]["2"] == {"offloaded": pytest.approx(ratio)}
    assert [*result["memory"]["offloaded"]["customers"]] == ["2"] and result["memory"]["offloaded"]["growth"] == 0
    offload = result["offload"]
    assert [option["place"] for option in offload["options"]] == ["server's device"] + ["customer's device"] * 4
    assert offload["recommended"] in offload["options"] and offload["table"] in done.stderr
    assert found["settings"]["customers"] == [2] and found["machine"]["device"]
    assert "tiny, 16 tokens a sequence" in done.stderr and "x LoRA" in done.stderr


def test_a_calibration_needs_no_cluster() -> None:
    given = side("unmerged", steps=1, staleness=1).model_dump()
    config = cola_offload.OffloadConfig.model_validate({**given, "customer_device": {"bandwidth": 1e12, "speed": 1e6}})
    found = cola_offload.measure(config)
    assert found["measured"]["send_s"] is None and found["measured"]["owners"] == 3
    # Nothing that travels in no time is fitted here.
    assert (found["recommended"]["place"], found["recommended"]["coding"]) == ("customer's device", "none")
    json.dumps(found)


def figures(rate: float, waits: float | None) -> dict[str, float | None]:
    return {"tokens_per_s": rate, "step_s": 0.1, "peak_bytes": 2**30, "fit_wait_share": waits}


def test_the_table_holds_figures_against_the_aims() -> None:
    result = {
        "sequence_length": 128,
        "throughput": {
            "8": {
                "LoRA": figures(100.0, None),
                "merged": figures(310.0, 0.04),
                "unmerged": {"failed": "out of memory"},
            }
        },
        "ratios": {"8": {"merged": 3.1}},
        "memory": {
            "merged": {"customers": {"1": {"server_bytes": 2**30}, "32": {"server_bytes": 2**30}}, "growth": 0.0},
            "offloaded": {"customers": {"1": {"server_bytes": 2**30}, "32": {"failed": "no result after 9 s"}}},
        },
        "offload": {"failed": "no cluster"},
    }
    lines = table({"gpt2": result}).splitlines()
    assert lines[0] == "gpt2, 128 tokens a sequence"
    assert lines[2].endswith("1.00 GiB   4.0% waiting for fits    3.10 x LoRA")
    assert lines[3].split()[3:] == ["failed:", "out", "of", "memory"]
    assert lines[4].endswith("32 customers 1.000 GiB, growth +0.00%")
    assert lines[5].endswith("32 customers failed: no result after 9 s")
    assert lines[6] == "  offload failed: no cluster"
    assert lines[7] == (
        "  verdict  merged with 8 customers 3.10 x LoRA (reaches the aim), memory merged +0.00% (reaches the aim), "
        "at most 4.0% of the time waiting for fits (reaches the aim)"
    )
    result["throughput"]["8"]["merged"]["fit_wait_share"] = 0.3
    result["ratios"]["8"]["merged"] = 2.9
    result["memory"]["merged"]["growth"] = 0.05
    assert table({"gpt2": result}).count("short of the aim") == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["customers=[0]"], "give numbers from 1 on, each once"),
        (["customers=[2, 2]"], "give numbers from 1 on, each once"),
        (["customers=[3, 8]"], "8 rows of a pass cannot be dealt out to 3"),
        (["sides=[QLoRA]"], "sides"),
    ],
)
def test_impossible_settings_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(ColaBenchmark, None, settings)
