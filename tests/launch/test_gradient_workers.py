"""Gradient learning by two training workers that share the base's weights, and one auxiliary worker, all on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ot_ray.cola import BasePass, Fits, find_sites, make_fitter
from ot_ray.errors import MergeError
from ot_ray.launch import WorkerGroup, run_workers
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.store import open_store
from ot_ray.training import FittingHere, GradientCheckpoints, learn
from ot_ray.training.deepspeed_base import ShardedBasePass
from ot_ray.training.gradient_workers import learn_together
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import tiny_model
from tests.launch.customers import assert_same
from tests.launch.gradient_functions import FITTING, RUN, SITES, Rows, learn_in_a_group, mode_of, tensors_of


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_group_learns_what_one_process_learns(local_ray: ClusterAddress, tmp_path: Path) -> None:
    model = tiny_model("llama", depth=2)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    group = WorkerGroup(count=2, max_failures=0, ray_storage=str(tmp_path / "ray"))
    assert run_workers(learn_in_a_group, {"folder": str(tmp_path)}, group, "together") == {"rank": 0, "workers": 2}

    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first["tensors"], second["tensors"])
    assert_same(first["states"], second["states"])
    base = BasePass(model, find_sites(model, SITES))
    mode, start = mode_of(base.sites)
    fitting = FittingHere(Fits({name: make_fitter(one, FITTING) for name, one in start.items()}))
    alone = learn(
        base,
        mode,
        Rows(),
        fitting,
        RUN,
        checkpoints=GradientCheckpoints(open_store(str(tmp_path / "alone")), "run", {}),
        evaluate=lambda: {"validation": base.losses(Rows()[99], mode)[0]["bob"]},
    )
    for ours, theirs in zip(first["evaluations"], alone.evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    losses = [name for name in alone.history[0] if name.startswith(("loss", "fits"))]
    for ours, theirs in zip(first["history"], alone.history, strict=True):
        assert [ours[name] for name in losses] == pytest.approx([theirs[name] for name in losses], rel=1e-4)
    for name, tensors in tensors_of(mode).items():
        for part, tensor in tensors.items():
            # AdamW divides by the gradient's own size, which lifts the roundings of small gradients.
            torch.testing.assert_close(first["tensors"][name][part], tensor, rtol=1e-3, atol=2e-5)
    assert [state["fitter"]["steps"] for state in first["states"].values()] == [RUN.steps] * 2
    # Rank 0 alone has written, once.
    assert GradientCheckpoints(open_store(str(tmp_path / "store")), "run", {}).committed() == [2, 4]


def test_merged_weights_are_refused_before_anything_runs() -> None:
    untouched = object.__new__(ShardedBasePass)
    run = RUN.model_copy(update={"merged": True})
    with pytest.raises(MergeError, match=r"run.merged is true, but the base's weights are sharded over ranks"):
        learn_together(untouched, None, Rows(), lambda: pytest.fail("a fitting was made"), run)  # type: ignore[arg-type]
