"""Worker groups under Ray Train: results, errors that arrive as themselves, and a worker that is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_ray.errors import LaunchError, TrainingError
from ot_ray.launch import WorkerGroup, run_workers
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.store import open_store
from ot_ray.training import distilled_state
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import VOCAB, tiny_model
from tests.launch.worker_functions import distil_and_die_once, foreign_error, our_error, sum_of_ranks

pytestmark = pytest.mark.slow

Run = Callable[..., dict[str, Any]]
STEPS, EVERY, KILL_AT = 6, 2, 5


@pytest.fixture
def run(local_ray: ClusterAddress, tmp_path: Path) -> Run:
    """Runs a function on a group of two, whose records lie in the test's own folder."""

    def run(function: Callable[..., Any], payload: dict[str, Any], max_failures: int = 0) -> dict[str, Any]:
        group = WorkerGroup(count=2, max_failures=max_failures, ray_storage=str(tmp_path / "ray"))
        return run_workers(function, payload, group, function.__name__)

    return run


def test_rank_0_s_value_comes_back(run: Run) -> None:
    assert run(sum_of_ranks, {"offset": 10}) == {"rank": 0, "world_size": 2, "sum": 21.0}


def test_our_own_error_arrives_as_itself(run: Run) -> None:
    with pytest.raises(TrainingError) as caught:
        run(our_error, {"rank": 1})
    assert type(caught.value) is TrainingError
    assert str(caught.value) == "the loss became nan at step 7; lower training.lr"


def test_another_error_is_a_launch_error_with_its_last_line(run: Run) -> None:
    with pytest.raises(LaunchError, match=r"run foreign_error failed: .*ValueError: not our tree: odd"):
        run(foreign_error, {"word": "odd"})


def test_a_killed_worker_changes_nothing_in_the_result(run: Run, tmp_path: Path) -> None:
    payload = _distillation(tmp_path)
    whole = run(distil_and_die_once, {**payload("whole"), "kill_at": 0})
    torn = run(distil_and_die_once, {**payload("torn"), "kill_at": KILL_AT}, max_failures=1)

    assert (tmp_path / "torn.died").exists()
    assert not (tmp_path / "whole.died").exists()
    assert [step["step"] for step in whole["figures"]] == [1, 2, 3, 4, 5, 6]
    # Step 5 was done and lost: the last committed checkpoint stood at 4.
    assert [step["step"] for step in torn["figures"]] == [5, 6]
    for ours, theirs in zip(torn["figures"], whole["figures"][4:], strict=True):
        assert _without_times(ours) == _without_times(theirs)
    store = open_store(str(tmp_path / "store"))
    expected, found = distilled_state(store, "whole"), distilled_state(store, "torn")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def _distillation(folder: Path) -> Callable[[str], dict[str, Any]]:
    tiny_model("opt").save_pretrained(folder / "full")
    tiny_tokenizer().save_pretrained(folder / "full")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, VOCAB, (64, 20), generator=generator).tolist()
    lines = (json.dumps({"text": " ".join(f"w{token}" for token in row)}) for row in rows)
    (folder / "public.jsonl").write_text("\n".join(lines))

    def payload(name: str) -> dict[str, Any]:
        distil = {
            "model": {"name": "tiny", "source": str(folder / "full")},
            "split": {"bottom": 1, "keep": 2, "top": 1},
            "data": {"source": str(folder / "public.jsonl")},
            "sequence_length": 16,
            "training": {
                "steps": STEPS, "batch_size": 4, "lr": 1e-3, "zero_stage": 3, "checkpoint_every": EVERY,
            },
            "store": str(folder / "store"),
            "run": name,
        }  # fmt: skip
        return {"distil": distil, "died": str(folder / f"{name}.died")}

    return payload


def _without_times(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != "tokens_per_s"}
