"""The efficiency benchmark at a tiny size: every side does the work it says, and is held against full fine-tuning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.benchmarks.efficiency import EfficiencyBenchmark, table
from jobs.benchmarks.shapes import SHAPES
from jobs.benchmarks.sides import middle
from ot_ray.config import load
from ot_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)  # five processes that load PyTorch, on a machine with other things to do
def test_sides_do_what_they_say_and_full_fine_tuning_is_that_of_transformers(tmp_path):
    kept = tmp_path / "found.json"
    settings = ["shapes=[tiny]", "sides=[FT, FT+LoRA, OT, OT+LoRA, Trainer]", "batch_sizes=[2]", "precision=float32"]
    command = [sys.executable, "-m", "jobs.benchmark", "efficiency", *settings, "steps=2", "repeats=1"]
    done = subprocess.run(
        [*command, f"output={kept}"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=560
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(kept.read_text())
    result = found["results"]["tiny, batch 2"]
    sides, width, inner = result["sides"], 32, 128
    # Of one layer: rank 4 in q, k, v, out, fc1 and fc2; and whole, with biases and two norms.
    lora = 4 * (4 * 2 * width + 2 * (width + inner))
    whole = 4 * (width * width + width) + 2 * width * inner + inner + width + 2 * 2 * width
    # Of the six layers of the full model, or the two around the emulator: none of the emulator learns.
    trainable = {side: figures["trainable_parameters"] for side, figures in sides.items()}
    assert (trainable["FT+LoRA"], trainable["OT+LoRA"], trainable["OT"]) == (6 * lora, 2 * lora, 2 * whole)
    assert sides["FT"]["trainable_parameters"] == sides["Trainer"]["trainable_parameters"]
    # The same tokens, the same start, the same optimiser: four steps of two independent loops.
    assert sides["FT"]["losses"] == pytest.approx(sides["Trainer"]["losses"], rel=1e-4)
    assert len(sides["FT"]["losses"]) == 4
    assert result["ratios"]["FT"] == {"speed": 1.0, "memory": 1.0}
    for side, figures in sides.items():
        assert figures["tokens_per_s"] > 0 and figures["peak_bytes"] > 0 and figures["batch_size"] == 2
        ratio = figures["tokens_per_s"] / sides["FT"]["tokens_per_s"]
        assert result["ratios"][side]["speed"] == pytest.approx(ratio)
    assert "tiny, batch 2, split 1-2-1, 16 tokens a sequence" in done.stderr and "x speed" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("  verdict  OT+LoRA has ")


@pytest.mark.parametrize(
    ("speed", "memory", "said"),
    [
        (
            8.0,
            0.125,
            "8.0 x the speed of FT (reaches the aim; paper 6.5, aim 8), 1/8.0 of its memory (reaches the aim;",
        ),
        (
            7.0,
            1 / 5.8,
            "(reaches the paper's; paper 6.5, aim 8), 1/5.8 of its memory (reaches the paper's; paper 1/5.6,",
        ),
        (2.0, 0.5, "(short of the paper's; paper 6.5, aim 8), 1/2.0 of its memory (short of the paper's; paper 1/5.6,"),
    ],
)
def test_the_verdict_holds_the_ratios_against_the_papers(speed, memory, said):
    sides = {side: {"failed": "not run here"} for side in ("FT", "OT+LoRA", "Trainer")}
    ratios = {"FT": None, "OT+LoRA": {"speed": speed, "memory": memory}, "Trainer": {"speed": 0.5, "memory": 2.0}}
    result = {"split": "2-8-2", "sequence_length": 512, "sides": sides, "ratios": ratios}
    verdict = table({"opt-1.3b, batch 1": result}).splitlines()[-1]
    assert said in verdict
    assert verdict.endswith("FT has 2.00 x the speed and 0.50 x the memory of Trainer")
    sides_alone = {**result, "ratios": {"FT": None}}
    assert "verdict" not in table({"opt-1.3b, batch 1": sides_alone})


def test_a_side_that_fails_is_shown_and_has_no_ratio():
    failed = {"failed": "torch.OutOfMemoryError: CUDA out of memory"}
    sides = {"FT": middle([failed, {"tokens_per_s": 1.0, "peak_bytes": 1}], ("tokens_per_s", "peak_bytes"))}
    result = {"split": "2-8-2", "sequence_length": 512, "sides": sides, "ratios": {"FT": None}}
    assert table({"opt-1.3b, batch largest": result}).splitlines()[1].split() == [
        "FT", "failed:", "torch.OutOfMemoryError:", "CUDA", "out", "of", "memory",
    ]  # fmt: skip


def test_the_median_of_runs_counts():
    runs = [{"tokens_per_s": speed, "peak_bytes": 8, "losses": [speed]} for speed in (3.0, 1.0, 2.0)]
    found = middle(runs, ("tokens_per_s", "peak_bytes"))
    assert found == {"tokens_per_s": 2.0, "peak_bytes": 8, "losses": [3.0], "tokens_per_s_runs": [3.0, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("batch_sizes=[largest]", "a CPU's memory has no hard end"),
        ("batch_sizes=[0]", "each is 1 or more, or largest"),
        ("sides=[LoRA]", "sides"),
    ],
)
def test_impossible_settings_are_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        load(EfficiencyBenchmark, None, [setting])


def test_the_papers_shapes_are_there():
    assert {str(SHAPES[name].split) for name in ("gpt2-xl", "opt-1.3b")} == {"2-16-2", "2-8-2"}
    assert SHAPES["gpt2-xl"].config().num_hidden_layers == 48
