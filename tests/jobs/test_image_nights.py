"""Nights of image models: what stops them before anything runs, and what the bundle's card tells customers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, ViTImageProcessorPil, ViTModel

from jobs.emulator import reading
from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.identity import for_workers, look_up
from jobs.emulator.night import run_night
from ot_ray.artifacts import load_emulated
from ot_ray.errors import ConfigError
from ot_ray.model import SplitPlan, uniform_layers
from ot_ray.store import open_store
from ot_ray.training import DistillConfig
from ot_ray.training.emulator_weights import write_weights
from tests.fixtures.models import SIDE, tiny_image_model

DEPTH, PLAN = 4, SplitPlan(bottom=1, keep=1, top=1)
CLASSES = ("ash", "birch")


def owner(place: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(place / "full")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(place / "full")
    draw = np.random.default_rng(0)
    for name in CLASSES:
        (place / "trees" / name).mkdir(parents=True)
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(place / "trees" / name / "a.png")
    return place


def classifier(model_type: str) -> PreTrainedModel:
    model = tiny_image_model(model_type, depth=DEPTH)
    model.config.id2label = dict(enumerate((*CLASSES, "cedar")))
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    return model


def night(place: Path, **changes: Any) -> MakeEmulatorConfig:
    values: dict[str, Any] = {
        "model": {"name": "trees", "source": str(place / "full")},
        "split": PLAN,
        "images": {"source": str(place / "trees"), "workers": 0},
        "training": {"steps": 0, "batch_size": 2},
        "store": str(place / "owner"),
        "workers": {"count": 1},
    }
    return MakeEmulatorConfig.model_validate({**values, **changes})


def untrained(payload: dict[str, Any], run: str) -> dict[str, Any]:
    """Leaves the weights that the emulator starts from, as a run without steps does."""
    config = DistillConfig.model_validate(payload["distill"])
    kept = uniform_layers(DEPTH - 2, config.split.keep)
    prefix = f"vision_model.encoder.layers.{config.split.bottom}."
    model = load_emulated(config.model, config.split, kept)
    state = {
        name.replace(prefix, "0.", 1): tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    write_weights(open_store(config.store), run, shapes, torch.float32, state.items())
    return {"steps": 0, "first": None, "last": None, "data_digest": config.data_digest, "perplexity": {}}


def test_a_tower_without_a_head_is_not_measured_after_a_whole_night(tmp_path: Path) -> None:
    place = owner(tmp_path, ViTModel(tiny_image_model("vit", depth=DEPTH).config))  # type: ignore[arg-type]
    held_out = {"source": str(place / "trees")}
    with pytest.raises(ConfigError, match=r"validation_images is set, but .*/full is a tower without a classification"):
        look_up(night(place, validation_images=held_out, gate={"min_gap": 0.01}))
    assert look_up(night(place)).reading.validation_images is None


@pytest.mark.parametrize(("model_type", "told"), [("blip_2_vision_model", True), ("clip", False)])
def test_the_card_tells_to_import_a_class_that_transformers_lacks(model_type: str, told: bool, tmp_path: Path) -> None:
    place = owner(tmp_path, classifier(model_type))
    answer = run_night(night(place), untrained)
    card = (place / "owner" / answer["published"] / "README.md").read_text()
    assert ("`import ot_ray.model` before its `from_pretrained`" in card) is told


def test_workers_read_the_held_out_images_at_the_commit_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = owner(tmp_path, classifier("vit"))
    local, seen = reading.load_images(night(place).images), []  # type: ignore[arg-type]
    # No hub can be reached from here; which commit is asked for is what counts.
    monkeypatch.setattr(
        reading, "resolved_image_revision", lambda config: {"hub:o/a": "1", "hub:o/b": "2"}[config.source]
    )
    monkeypatch.setattr(reading, "load_images", lambda config, files: seen.append(config.revision) or local)
    monkeypatch.setattr(reading, "image_digest", lambda config, files: f"digest of {config.revision}")
    config = night(place, images={"source": "hub:o/a"}, validation_images={"source": "hub:o/b"})
    inputs = look_up(config)
    handed = for_workers(config, inputs)["distill"]
    assert (handed["images"]["revision"], handed["validation_images"]["revision"]) == ("1", "2")
    assert (inputs.reading.digest, inputs.reading.held_out, seen) == ("digest of 1", "digest of 2", ["1", "2"])
