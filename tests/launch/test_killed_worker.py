"""A distillation with ZeRO-3 under Ray Train, one of whose workers is killed: it ends as one left alone does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_ray.launch import WorkerGroup, run_workers
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.store import open_store
from ot_ray.training import distilled_state
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import VOCAB, tiny_model
from tests.launch.worker_functions import distil_and_die_once
from tests.training.samples import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

STEPS, EVERY, KILL_AT = 6, 2, 5
_TIMES = {"tokens_per_s", "seconds", "data_wait", "data_wait_share", "mfu", "seconds_left"}


def test_a_killed_worker_changes_nothing_in_the_result(local_ray: ClusterAddress, tmp_path: Path) -> None:
    payload = _distillation(tmp_path)
    group = WorkerGroup(count=2, max_failures=1, ray_storage=str(tmp_path / "ray"))
    whole = run_workers(distil_and_die_once, {**payload("whole"), "kill_at": 0}, group, "whole")
    torn = run_workers(distil_and_die_once, {**payload("torn"), "kill_at": KILL_AT}, group, "torn")

    assert (tmp_path / "torn.died").exists()
    assert not (tmp_path / "whole.died").exists()
    assert [step["step"] for step in whole["figures"]] == [1, 2, 3, 4, 5, 6]
    # Step 5 was done and lost. The checkpoint of step 4 was being written meanwhile, in the background.
    assert [step["step"] for step in torn["figures"]] in ([5, 6], [3, 4, 5, 6])
    for ours, theirs in zip(torn["figures"], whole["figures"][-len(torn["figures"]) :], strict=True):
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
    return {name: value for name, value in figures.items() if name not in _TIMES}
