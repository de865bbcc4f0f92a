"""How often the gap to the full model is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ot_ray.model import DistillLoss, DistillModel, EmulatorConfig, SplitPlan
from ot_ray.store import open_store
from ot_ray.training import TorchEngine, TrainingConfig
from ot_ray.training.emulator_gap import EmulatorGap, HeldOut
from tests.fixtures.models import tiny_model, tokens


@pytest.mark.parametrize(("steps", "passes"), [(0, ["full", "emulated"]), (2, ["full", "emulated", "emulated"])])
def test_an_emulator_that_learns_nothing_is_measured_once(tmp_path: Path, steps: int, passes: list[str]) -> None:
    plan = SplitPlan(bottom=1, keep=2, top=1)
    module = DistillModel(tiny_model("opt"), plan, [0, 3], DistillLoss(), emulator=EmulatorConfig(sparsity=0.5))
    seen: list[str] = []

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # A step has no setting.
        seen.extend([kwargs["setting"]] if "setting" in kwargs else [])

    module.register_forward_pre_hook(see, with_kwargs=True)
    engine = TorchEngine(module, TrainingConfig(steps=max(steps, 1), batch_size=2, lr=1e-2), "cpu")
    batch = {"input_ids": tokens(), "labels": tokens()}
    held_out = HeldOut(2, lambda rows: {name: tensor[list(rows)] for name, tensor in batch.items()}, "0" * 64)
    gap = EmulatorGap(engine, open_store(str(tmp_path)), "runs/r", lambda: held_out, None)
    gap.measure_start()
    for _ in range(steps):
        engine.step(batch, 1e-2)
    found = gap.measure_end(steps)
    assert seen == passes
    assert found.keys() == {"full", "dropped", "emulated"}
    assert (found["emulated"] == found["dropped"]) == (steps == 0) and found["full"] != found["dropped"]
