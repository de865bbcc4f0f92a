"""The benchmark command at a tiny size: its figures are there, and both sides train to the same losses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.benchmark import main
from jobs.benchmarks import distill, efficiency
from jobs.benchmarks.distill import table
from jobs.benchmarks.shapes import SHAPES
from ot_ray.errors import ConfigError
from ot_ray.model import check_supported

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> tuple[int, str, str]:
    """The command as a person runs it: what another test's Ray prints is not in its output."""
    command = [sys.executable, "-m", "jobs.benchmark", "distill", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_both_sides_have_their_figures_and_equal_losses(tmp_path):
    kept = tmp_path / "found.json"
    code, out, err = run("shapes=[tiny]", "sides=[plain-float32, ours-float32]", "repeats=1", f"output={kept}")
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads(kept.read_text())
    assert found["machine"].keys() == {"device", "threads", "torch", "python"}
    result = found["results"]["tiny"]
    assert (result["split"], result["batch_size"], result["sequence_length"]) == ("1-2-1", 2, 16)
    assert result["plan"]["peak_bytes"] > 0 and result["plan"]["tokens_per_s"] is None
    for side in result["sides"].values():
        assert side["tokens_per_s"] > 0 and side["flops_per_s"] > 0 and side["peak_bytes"] > 0
        assert side["mfu"] is None and len(side["tokens_per_s_runs"]) == 1
        assert len(side["losses"]) == 4 and all(math.isfinite(step["loss"]) for step in side["losses"])
    (compared,) = result["comparisons"]
    assert (compared["plain"], compared["ours"]) == ("plain-float32", "ours-float32")
    # Four AdamW steps in float32; the sides sum in different orders.
    assert compared["loss_difference"] < 1e-4
    assert "tiny 1-2-1, batch 2 x 16 tokens" in err and "x tokens/s" in err


def test_a_side_without_a_result_in_time_is_shown_as_such(tmp_path):
    kept = tmp_path / "results/deep/found.json"
    code, out, err = run("shapes=[tiny]", "sides=[plain-float32]", "repeats=2", "timeout_s=0.01", f"output={kept}")
    assert code == 0, err
    assert json.loads(out)["results"]["tiny"]["sides"] == {"plain-float32": {"failed": "no result after 0.01 s"}}
    assert "failed: no result after 0.01 s" in err
    # The folder was not there.
    assert json.loads(kept.read_text()) == json.loads(out)


@pytest.mark.parametrize("benchmark", [distill, efficiency])
def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(benchmark, tmp_path, monkeypatch):
    def ran(*_):
        raise AssertionError("a side ran")

    monkeypatch.setattr(benchmark, "run_side", ran)
    (tmp_path / "file").write_text("")
    cls = {distill: distill.DistillBenchmark, efficiency: efficiency.EfficiencyBenchmark}[benchmark]
    for output, said in ((tmp_path / "file/found.json", "is a file; name a folder"), (tmp_path, "which is a folder")):
        with pytest.raises(ConfigError, match=said):
            benchmark.run(cls(shapes=["tiny"], output=str(output)))


def test_a_side_that_fails_is_shown_as_such():
    failed = {"failed": "torch.OutOfMemoryError: CUDA out of memory"}
    compared = {"plain": "plain-float32", "ours": "ours-bfloat16", "speed": None, "memory": None}
    result = {"split": "2-8-2", "batch_size": 8, "sequence_length": 512, "sides": {"plain-float32": failed}}
    plan = {"peak_bytes": 2**30, "tokens_per_s": 12345.6, "hardware": "NVIDIA H200"}
    text = table({"opt-1.3b": {**result, "plan": plan, "comparisons": [compared]}})
    assert "plan                 12346 tokens/s     1.00 GiB  one DeepSpeed worker, bfloat16, NVIDIA H200" in text
    assert "plain-float32   failed: torch.OutOfMemoryError" in text and "one of them failed" in text


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_can_be_split_as_it_says(name):
    shape = SHAPES[name]
    config = shape.config()
    check_supported(config.model_type)
    assert len(shape.split.middle(config.num_hidden_layers)) >= shape.split.keep


def test_an_unknown_shape_or_setting_is_a_message():
    code, _, err = run("shapes=[opt-9b]")
    assert code == 2 and "shapes names 'opt-9b'; use some of: tiny, quickstart" in err
    code, _, err = run("repeat=1")
    assert code == 2 and "unknown key repeat; did you mean repeats?" in err


def test_an_unknown_benchmark_is_a_message(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["distil"])
    assert ended.value.code == 2
    assert "invalid choice: 'distil'" in capsys.readouterr().err
