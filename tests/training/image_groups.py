"""What a group of DeepSpeed workers does for test_image_engine.py; rank 0 leaves what it saw in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ot_ray.model import IMAGE_FAMILIES, ImageDistillModel
from ot_ray.training import DeepSpeedEngine, TrainingConfig
from ot_ray.training.engine import Engine
from tests.fixtures.models import images, tiny_image_model
from tests.training.samples import KEPT, PLAN, training

STEPS, ROWS = 3, 4
SETTINGS = ("full", "emulated")


def config() -> TrainingConfig:
    return training(zero_stage=3, steps=STEPS, batch_size=ROWS)


def module(model_type: str) -> ImageDistillModel:
    return ImageDistillModel(tiny_image_model(model_type), PLAN, KEPT)


def seen(engine: Engine) -> dict[str, Any]:
    """The losses of some steps, and afterwards the cross-entropy of each lane over all rows."""
    whole = {"pixel_values": images(ROWS), "labels": torch.tensor([0, 1, 2, 0])}
    share = ROWS // engine.world_size
    own = slice(engine.rank * share, (engine.rank + 1) * share)
    losses = [engine.step({name: rows[own] for name, rows in whole.items()}, 1e-3)["loss"] for _ in range(STEPS)]
    engine.module.eval()
    with torch.no_grad():
        nll = {setting: float(engine.module(**whole, setting=setting)["nll"]) for setting in SETTINGS}
    return {"losses": losses, "nll": nll}


def run_pair(folder: Path) -> None:
    found = {model_type: seen(DeepSpeedEngine(module(model_type), config())) for model_type in sorted(IMAGE_FAMILIES)}
    if os.environ["RANK"] == "0":
        (folder / "seen.json").write_text(json.dumps(found))
