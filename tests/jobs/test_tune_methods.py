"""Each tuning method through the verbs, from a bundle and a data set to a promoted plug-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import plug_in, tune
from ot_ray.artifacts import BundleSource, Registry, load_full, write_bundle
from ot_ray.data import DataConfig, load_sequences
from ot_ray.evaluation import perplexity
from ot_ray.model import METHODS, BottleneckSettings, LoraSettings, Method, ModelConfig, SplitPlan, emulate
from ot_ray.model import plug_in as plugged
from ot_ray.store import open_store
from ot_ray.training import TrainingConfig
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import tiny_model
from tests.jobs.scene import write_data

DEPTH, LENGTH = 6, 24
# The model is 32 wide, its MLP 48: an adapter layer has 4 maps of 32 x 32, 2 of 32 x 48, their biases, and 2 norms.
COUNTS = {
    "full": 2 * (4 * 32 * 33 + 32 * 48 + 48 + 48 * 32 + 32 + 4 * 32),
    "lora": 2 * 2 * (4 * 64 + 2 * 80),
    "bottleneck": 2 * 2 * (2 * 3 * 32 + 3 + 32),
    "bitfit": 2 * (4 * 32 + 48 + 32 + 4 * 32),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's model and the customer's data."""
    place = tmp_path_factory.mktemp("methods")
    full = tiny_model("opt", DEPTH)
    full.save_pretrained(place / "full")
    tiny_tokenizer().save_pretrained(place / "full")
    write_data(place / "train.jsonl")
    return place


def bundle(place: Path, plan: SplitPlan) -> BundleSource:
    folder = place / f"bundle-{plan}"
    if not folder.exists():
        emulated = emulate(tiny_model("opt", DEPTH), plan, [0, 2])
        write_bundle(
            folder, emulated, tiny_tokenizer(), plan, name="tiny", version="1", recommended={}, card="# Tiny\n"
        )
    return BundleSource(folder=str(folder))


@pytest.mark.parametrize("plan", [SplitPlan(bottom=1, keep=2, top=1), SplitPlan(bottom=0, keep=2, top=2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_tuned_returned_promoted(place: Path, plan: SplitPlan, method: Method) -> None:
    data, name = DataConfig(source=str(place / "train.jsonl")), f"{method}-{plan}"
    tuned = tune.run(
        tune.TuneConfig(
            bundle=bundle(place, plan),
            data=data,
            validation=data,
            sequence_length=LENGTH,
            method=method,
            lora=LoraSettings(rank=2),
            bottleneck=BottleneckSettings(size=3),
            training=TrainingConfig(steps=12, batch_size=8, lr=2e-2, warmup_steps=0, evaluate_every=6),
            output=str(place / f"adapter-{name}"),
        )
    )
    assert tuned["trainable_parameters"] == COUNTS[method]
    losses = [entry["validation_loss"] for entry in tuned["validation_losses"]]
    assert losses[-1] < losses[0]
    manifest = json.loads((place / f"adapter-{name}/manifest.json").read_text())
    assert manifest["method"] == method
    # Left out where it says nothing, so that older readers know every key.
    assert manifest.get("bottleneck", "left out") == (3 if method == "bottleneck" else "left out")

    model = ModelConfig(name="tiny", source=str(place / "full"))
    promoted = plug_in.run(
        plug_in.PlugInConfig(
            model=model,
            bundle=bundle(place, plan),
            adapter=str(place / f"adapter-{name}"),
            tenant="acme",
            suffix=name,
            store=str(place / "registry"),
            data=data,
            sequence_length=LENGTH,
            max_perplexity_ratio=1.0,
        )
    )
    assert promoted["report"]["plug_in_perplexity"] < promoted["report"]["full_perplexity"]
    # What is served is what was measured.
    state = Registry(open_store(str(place / "registry"))).load_state(promoted["model_id"])
    sequences = load_sequences(data, tiny_tokenizer(), LENGTH).sequences
    assert perplexity(plugged(load_full(model), plan, state), sequences) == promoted["report"]["plug_in_perplexity"]
