"""Nights whose emulator is pruned and quantized: what is published is small, measured, tunable, and owned up to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.emulator.night import run_night
from jobs.tune import TuneConfig
from jobs.tune import run as tune
from ot_ray.artifacts import BundleSource, load_emulated
from ot_ray.artifacts.safetensors_header import read_header
from ot_ray.data import DataConfig, collate, load_sequences
from ot_ray.errors import ConfigError
from ot_ray.evaluation import perplexity
from ot_ray.model import METHODS, PackedLinear, SplitPlan, compress
from ot_ray.store import open_store
from ot_ray.training import DistillConfig
from ot_ray.training.emulator_weights import write_weights
from tests.jobs.nights import night_config
from tests.jobs.scene import DEPTH
from tests.training.distilling import distil
from tests.training.samples import PATIENCE, run_group

WHOLE = SplitPlan(bottom=1, keep=DEPTH - 2, top=1)
WAY = {"sparsity": 0.5, "bits": 4, "group_size": 16}


def never(payload: dict[str, Any], run: str) -> dict[str, Any]:
    raise AssertionError("nothing is to be distilled")


def untrained(payload: dict[str, Any], run: str) -> dict[str, Any]:
    """Leaves the weights that the emulator starts from, as a run without steps does."""
    config = DistillConfig.model_validate(payload["distill"])
    assert run == config.run
    middle = config.split.middle(DEPTH)
    emulated = load_emulated(config.model, config.split, range(len(middle))[: config.split.keep])
    prefix = "model.decoder.layers."
    state = {}
    for name, tensor in emulated.state_dict().items():
        place, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and 0 <= int(place) - config.split.bottom < config.split.keep:
            state[f"{int(place) - config.split.bottom}.{rest}"] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    write_weights(open_store(config.store), run, shapes, torch.float32, state.items())
    return {"steps": 0, "first": None, "last": None, "data_digest": config.data_digest, "perplexity": {}}


def _bundle(scene: Path, folder: Path) -> Any:
    source = BundleSource(store=str(scene / "bundles"), model="tiny", public_key=str(scene / "keys/public.pem"))
    return source.open(folder)


def _config(scene: Path, **changes: Any) -> Any:
    training = {"steps": 0, "batch_size": 2}
    return night_config(scene, **{"training": training, "split": WHOLE, "emulator": WAY, "validation": None, **changes})


def test_every_layer_of_the_middle_is_published_with_a_warning(scene: Path, tmp_path: Path) -> None:
    answer = run_night(_config(scene), untrained)
    (warning,) = answer["warnings"]
    assert "split.keep is 4, every layer of the middle" in warning and "how deep the full model is" in warning
    assert run_night(_config(scene), never)["warnings"] == [warning]
    report = scene / f"owner/runs/{answer['run']}/report-{answer['version']}.html"
    assert "every layer of the middle" in report.read_text()
    bundle = _bundle(scene, tmp_path / "bundle")
    card = (bundle.folder / "README.md").read_text()
    assert "with 50% of their weights pruned and in 4 bits a weight" in card and "import ot_ray.model" in card
    assert "every layer" not in card and "warning" not in (bundle.folder / "manifest.json").read_text()
    assert sum(isinstance(module, PackedLinear) for module in bundle.load_model().modules()) == 6 * WHOLE.keep


def test_fewer_layers_come_without_a_warning(scene: Path) -> None:
    fewer = SplitPlan(bottom=1, keep=2, top=1)
    assert "warnings" not in run_night(_config(scene, split=fewer), untrained)
    # Dropping layers is enough.
    assert "warnings" not in run_night(_config(scene, split=fewer, emulator={}), untrained)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"emulator": {}}, r"split\.keep is 4, every layer of the middle, and emulator compresses none of them"),
        ({"split": {"bottom": 1, "keep": 5, "top": 1}}, r"split\.keep is 5, but only 4 layers lie between"),
    ],
)
def test_the_full_model_and_more_are_refused(scene: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError if "emulator" in changes else ValueError, match=reason):
        run_night(_config(scene, **changes), never)
    assert not (scene / "bundles").exists()


def test_how_it_is_compressed_decides_the_version(scene: Path) -> None:
    ways = [WAY, {**WAY, "bits": 3}, {**WAY, "sparsity": 0.25}, {"bits": 4}, {"sparsity": 0.5}]
    fewer = SplitPlan(bottom=1, keep=2, top=1)
    answers = [run_night(_config(scene, split=fewer, emulator=way), untrained) for way in ways]
    assert len({answer["version"] for answer in answers}) == len({answer["run"] for answer in answers}) == len(ways)


def _learn(scene: Path) -> None:
    """Have the full model know the text a little, so that whatever is done to its weights makes it worse."""
    model = AutoModelForCausalLM.from_pretrained(scene / "full")
    tokenizer = AutoTokenizer.from_pretrained(scene / "full")
    batch = collate(load_sequences(DataConfig(source=str(scene / "train.jsonl")), tokenizer, 16).sequences)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        model(batch["input_ids"], labels=batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(scene / "full")


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_from_a_night_without_steps_to_tuned_adapters(scene: Path, tmp_path: Path) -> None:
    def distilled(payload: dict[str, Any], run: str) -> dict[str, Any]:
        run_group(distil, 1, payload["distill"], tmp_path)
        return json.loads((tmp_path / "0.json").read_text())

    _learn(scene)
    held_out = {"source": str(scene / "train.jsonl"), "limit": 8}
    config = _config(scene, validation=held_out)
    answer = run_night(config, distilled)
    bundle = _bundle(scene, tmp_path / "bundle")
    model = bundle.load_model()
    text = load_sequences(config.validation, bundle.load_tokenizer(), config.sequence_length).sequences
    assert answer["emulator_gap"]["emulated"] == pytest.approx(perplexity(model, text), rel=1e-5)
    # Every layer is kept: were they not compressed, there would be no gap at all.
    assert answer["emulator_gap"]["emulated"] > answer["emulator_gap"]["full"] * 1.05

    emulated = compress(load_emulated(config.model, WHOLE, range(WHOLE.keep)), WHOLE, config.emulator)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in emulated.state_dict().items())
    header = read_header(bundle.folder / "emulator.safetensors")
    stored = sum(entry.end - entry.start for name, entry in header.items() if ".layers." in name)
    layers = list(model.model.decoder.layers)[1:-1]
    held = sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    assert held == pytest.approx(stored, rel=0.1)

    for method in METHODS:
        tuned = tune(
            TuneConfig.model_validate(
                {
                    "bundle": {"folder": str(bundle.folder)},
                    "data": {"source": str(scene / "train.jsonl")},
                    "validation": held_out,
                    "sequence_length": 16,
                    "method": method,
                    "training": {"steps": 20, "batch_size": 4, "lr": 3e-3},
                    "output": str(tmp_path / method),
                }
            )
        )
        assert tuned["bundle_id"] == answer["bundle_id"], method
        # On the packed emulator, which is better on the text once its adapter has learnt it.
        assert math.exp(tuned["validation_losses"][-1]["validation_loss"]) < answer["emulator_gap"]["emulated"], method
