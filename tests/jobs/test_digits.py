"""Offsite tuning of an image model from end to end on handwritten digits: a small ViT that was trained on some of them
is tuned on the others, through the verbs, with all five settings as accuracies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from jobs import evaluate, make_emulator, plug_in, tune
from ot_ray.artifacts import BundleSource, Registry, generate_key
from ot_ray.data.images import ImageConfig, load_images
from ot_ray.errors import AdapterRejectedError
from ot_ray.evaluation import SETTINGS, GateConfig, accuracy
from ot_ray.launch import WorkerGroup
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import ModelConfig, SplitPlan
from ot_ray.store import LocalStore
from ot_ray.training import TrainingConfig, fit_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIDE, DEPTH, PLAN = 8, 6, SplitPlan(bottom=1, keep=2, top=1)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OWNED, PRIVATE = range(7), range(7, 10)
"""The digits that the owner's model was trained on, and the customer's."""
PRE_TRAINING = TrainingConfig(steps=250, batch_size=64, lr=2e-3, warmup_steps=50, betas=(0.9, 0.98))
DISTILLING = {"steps": 300, "batch_size": 64, "lr": 2e-3, "warmup_steps": 10}
TUNING = TrainingConfig(steps=40, batch_size=30, lr=1e-3)
EACH = 10
"""Training images of each of the customer's classes."""


@dataclass(frozen=True)
class Digits:
    """The owner's and the customer's folders, and each verb on them."""

    place: Path
    keys: tuple[Path, Path]

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(name="digits", source=str(self.place / "base"))

    @property
    def bundle(self) -> BundleSource:
        return BundleSource(store=str(self.place / "bundles"), model="digits", public_key=str(self.keys[1]))

    def images(self, name: str) -> ImageConfig:
        return ImageConfig(source=str(self.place / name))

    def emulator(self, **changes: Any) -> make_emulator.MakeEmulatorConfig:
        values: dict[str, Any] = {
            "model": self.model,
            "split": PLAN,
            "images": self.images("public"),
            "validation_images": self.images("held_out"),
            "training": DISTILLING,
            "gate": GateConfig(min_gap=0.01),
            "store": str(self.place / "owner"),
            "bundles": str(self.place / "bundles"),
            "workers": WorkerGroup(count=1, ray_storage=str(self.place / "ray")),
            "private_key": str(self.keys[0]),
        }
        return make_emulator.MakeEmulatorConfig.model_validate({**values, **changes})

    def tuning(self, output: str, **changes: Any) -> tune.TuneConfig:
        values: dict[str, Any] = {
            "bundle": self.bundle,
            "images": self.images("train"),
            "validation_images": self.images("validation"),
            "training": TUNING,
            "output": str(self.place / output),
        }
        return tune.TuneConfig(**{**values, **changes})

    def plugging(self, adapter: str, **changes: Any) -> plug_in.PlugInConfig:
        values: dict[str, Any] = {
            "model": self.model,
            "bundle": self.bundle,
            "adapter": str(self.place / adapter),
            "tenant": "acme",
            "suffix": adapter,
            "store": str(self.place / "registry"),
            "images": self.images("test"),
        }
        return plug_in.PlugInConfig(**{**values, **changes})

    def evaluation(self, **changes: Any) -> evaluate.EvaluateConfig:
        values: dict[str, Any] = {
            "model": self.model,
            "bundle": self.bundle,
            "adapter": str(self.place / "adapter"),
            "train_images": self.images("train"),
            "test_images": self.images("test"),
            "training": TUNING,
            "output": str(self.place / "report"),
        }
        return evaluate.EvaluateConfig(**{**values, **changes})

    @cached_property
    def made(self) -> dict[str, Any]:
        """What the owner's job returned."""
        made = make_emulator.run(self.emulator())
        assert made is not None
        return made

    @cached_property
    def tuned(self) -> dict[str, Any]:
        """What the customer's job returned."""
        assert self.made["published"]
        return tune.run(self.tuning("adapter"))

    @cached_property
    def report(self) -> dict[str, Any]:
        """The five settings."""
        assert self.tuned["adapter"]
        return evaluate.run(self.evaluation())


def write_digits(place: Path) -> None:
    """Real handwriting, 8 x 8 pixels in grey: the owner's digits public and held out, the customer's in three parts."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    seen = dict.fromkeys(range(10), 0)
    for row in order:
        digit, number = int(data.target[row]), seen[int(data.target[row])]
        seen[digit] += 1
        if digit in OWNED:
            part = "held_out" if number < 20 else "public"
        else:
            part = "train" if number < EACH else "validation" if number < 2 * EACH else "test"
        folder = place / part / NAMES[digit]
        folder.mkdir(parents=True, exist_ok=True)
        grey = (data.images[row] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:03}.png")


def pre_train(place: Path) -> None:
    """The owner's model, trained on its own digits from random weights, as a folder of Transformers."""
    images = load_images(ImageConfig(source=str(place / "public")))
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SIDE,
        patch_size=2,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(images.classes)),
        label2id={name: number for number, name in enumerate(images.classes)},
    )
    model = ViTForImageClassification(shape)
    fit_images(model, images, processor, PRE_TRAINING)
    model.save_pretrained(place / "base")
    processor.save_pretrained(place / "base")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the workers have it: sums are then added in one order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(local_ray: ClusterAddress, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Digits:
    place = tmp_path_factory.mktemp("digits")
    write_digits(place)
    pre_train(place)
    return Digits(place, generate_key(place / "keys"))


def test_the_owner_s_model_knows_its_digits(digits: Digits) -> None:
    model = AutoModelForImageClassification.from_pretrained(digits.place / "base")
    processor = ViTImageProcessorPil.from_pretrained(digits.place / "base")
    assert accuracy(model, load_images(digits.images("held_out")), processor) > 0.85


def test_distilling_narrows_the_emulator_gap(digits: Digits) -> None:
    gap = digits.made["emulator_gap"]
    assert gap["full"] < gap["emulated"] < gap["dropped"]
    assert digits.made["last"]["kd_loss"] < digits.made["first"]["kd_loss"] / 2
    assert digits.made["last"]["images_per_s"] > 0 and "lm_loss" not in digits.made["last"]
    card = digits.bundle.open(digits.place / "for the card").folder / "README.md"
    assert "perplexity on held-out public images" in card.read_text()


def test_the_same_inputs_do_nothing_the_second_time(digits: Digits) -> None:
    assert digits.made
    again = make_emulator.run(digits.emulator())
    assert again is not None and again["already"] and again["bundle_id"] == digits.made["bundle_id"]


def test_tuning_reports_accuracy_and_names_its_classes(digits: Digits) -> None:
    tuned = digits.tuned
    assert tuned["classes"] == sorted(NAMES[digit] for digit in PRIVATE)
    assert tuned["images"] == EACH * len(PRIVATE)
    assert tuned["validation_losses"][-1]["validation_accuracy"] > 0.6
    manifest = json.loads((digits.place / "adapter/manifest.json").read_text())
    assert manifest["classes"] == tuned["classes"]


def test_the_five_settings_are_in_the_paper_s_order(digits: Digits) -> None:
    report = digits.report
    assert report["measure"] == "accuracy" and all(0 < report[name] < 1 for name in SETTINGS)
    assert report["ot_plug_in"] > report["full_zero_shot"] + 0.05
    assert report["ot_emulator"] > report["emulator_zero_shot"] + 0.05
    assert report["full_fine_tuned"] > report["full_zero_shot"] + 0.05
    # With so few images of digits that the middle never saw, the tuned emulator and the plug-in are level: which of
    # them is ahead changes with the draw of the images, by up to two points.
    assert report["ot_plug_in"] > report["ot_emulator"] - 0.05
    written = json.loads((digits.place / "report/five_settings.json").read_text())
    assert written["measure"] == "accuracy" and written["ot_plug_in"] == report["ot_plug_in"]


def test_the_adapter_is_plugged_in_and_promoted(digits: Digits) -> None:
    assert digits.report
    found = plug_in.run(digits.plugging("adapter", min_accuracy=0.5))
    assert found["report"]["plug_in_accuracy"] == pytest.approx(digits.report["ot_plug_in"])
    assert found["report"]["ot_emulator_accuracy"] == pytest.approx(digits.report["ot_emulator"])
    record = Registry(LocalStore(digits.place / "registry")).get(found["model_id"])
    assert list(record.classes or ()) == digits.tuned["classes"]
    with pytest.raises(AdapterRejectedError, match=r"min_accuracy is 100\.0%; it is not promoted"):
        plug_in.run(digits.plugging("adapter", min_accuracy=1.0))
