"""A night's layers are chosen once, by the whole model and the owner's text, and whoever goes on uses the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from jobs import make_emulator
from jobs.emulator import choosing, night
from jobs.emulator.identity import look_up
from jobs.emulator.night import run_night
from ot_ray.artifacts import BundleSource, load_full, open_model_source
from ot_ray.data import collate, load_sequences
from ot_ray.data.images import ImageBatches, ImageConfig, load_images
from ot_ray.errors import ConfigError, DataError, SplitError, UnsupportedModelError
from ot_ray.model import EmulatorConfig, SplitPlan, emulate, load_emulator
from ot_ray.model.choice import choose_layers, smaller_layers
from ot_ray.model.packed import with_smaller_layers
from ot_ray.store import LocalStore
from ot_ray.training import kept_layers
from tests.fixtures.models import SIDE, tiny_image_model, tiny_model
from tests.jobs.nights import Distilling, kept_files, night_config
from tests.jobs.scene import PLAN

CKA = {"layers": "cka", "calibration": 10}


def calibration(config: Any) -> list[dict[str, torch.Tensor]]:
    """The first ten sequences, four at a time."""
    tokenizer = open_model_source(config.model).tokenizer()
    sequences = load_sequences(config.data, tokenizer, config.sequence_length).sequences[:10]
    return [collate(sequences[i : i + 4]) for i in range(0, len(sequences), 4)]


def expected(config: Any) -> list[int]:
    """The choice as the library makes it."""
    return choose_layers(load_full(config.model), config.split, config.emulator, calibration(config))


def record(scene: Path, answer: dict[str, Any]) -> dict[str, Any]:
    return json.loads(LocalStore(scene / "owner").read(f"records/tiny/{answer['version']}.json"))


def never(payload: dict[str, Any], run: str) -> dict[str, Any]:
    raise AssertionError("nothing is to be chosen or distilled")


def always(payload: dict[str, Any], run: str) -> dict[str, Any]:
    return {"kept": [0, 3]}


def handing(seen: list[Any]) -> Any:
    """Distils, and notes which layers it was handed."""
    inner = Distilling()

    def distil(payload: dict[str, Any], run: str) -> dict[str, Any]:
        seen.append(payload["distill"]["kept"])
        return inner(payload, run)

    return distil


@pytest.mark.parametrize("layers", ["cka", "gradient"])
def test_the_layers_that_are_chosen_are_distilled_recorded_and_kept_from_customers(layers: str, scene: Path) -> None:
    config, seen = night_config(scene, emulator={**CKA, "layers": layers}), []
    answer = run_night(config, handing(seen))
    kept = expected(config)
    assert list(seen[0]) == kept == record(scene, answer)["kept"]
    chosen = json.loads(LocalStore(scene / "owner").read(f"runs/{answer['run']}/layers.json"))
    assert chosen["kept"] == kept
    assert not [name for name in kept_files(scene) if name.startswith("bundles/") and "layers" in name]


def test_a_uniform_night_chooses_nothing(scene: Path) -> None:
    answer = run_night(night_config(scene), Distilling(), never)
    assert record(scene, answer)["kept"] == [0, 3]
    assert f"owner/runs/{answer['run']}/layers.json" not in kept_files(scene)


class Killed(Exception):  # noqa: N818 - not an error
    """Stands for whatever ends a night."""


def test_a_night_that_goes_on_uses_the_layers_of_before(scene: Path) -> None:
    config = night_config(scene, emulator=CKA)

    def dying(payload: dict[str, Any], run: str) -> dict[str, Any]:
        raise Killed

    other: list[int] = [1, 3]
    with pytest.raises(Killed):
        run_night(config, dying, lambda payload, run: {"kept": other})
    seen: list[Any] = []
    answer = run_night(config, handing(seen), never)
    assert list(seen[0]) == other == record(scene, answer)["kept"] != expected(config)


def test_the_choice_and_its_settings_are_part_of_what_decides_a_bundle(scene: Path) -> None:
    versions = [
        run_night(night_config(scene, emulator=emulator), Distilling(), always)["version"]
        for emulator in (CKA, {**CKA, "calibration": 11}, {"layers": "gradient"})
    ]
    assert len({*versions, run_night(night_config(scene), Distilling())["version"]}) == 4


def test_a_run_of_this_name_with_other_inputs_is_refused(scene: Path) -> None:
    run_night(night_config(scene, emulator=CKA, run="mine"), Distilling())
    with pytest.raises(ConfigError, match="run is 'mine', but the layers of that run were chosen for another model"):
        run_night(night_config(scene, emulator={**CKA, "layers": "gradient"}, run="mine"), never, never)


def test_text_without_anything_to_learn_is_told_before_distilling(scene: Path) -> None:
    (scene / "train.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="nothing to learn"):
        run_night(night_config(scene, emulator=CKA, validation=None), never)


WHOLE = {"bottom": 1, "keep": 4, "top": 1}


@pytest.mark.parametrize(
    "shares",
    [{"attention_rank": 0.5}, {"mlp_channels": 1.0}, {"attention_rank": 0.4995, "sparsity": 1e-6}],
)
def test_shares_that_take_nothing_away_do_not_publish_the_whole_middle(scene: Path, shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="the bundle would hold the full model"):
        run_night(night_config(scene, split=WHOLE, emulator=shares), never, never)


@pytest.mark.parametrize("shares", [{"attention_rank": 0.6}, {"mlp_channels": 0.99}, {"sparsity": 0.01}, {"bits": 8}])
def test_shares_that_take_something_away_are_looked_up(scene: Path, shares: dict[str, float]) -> None:
    # Its fused map to queries, keys and values is three times as wide as it is high.
    tiny_model("gpt2").save_pretrained(scene / "full")
    assert look_up(night_config(scene, split=WHOLE, emulator=shares)).depth == 6


def test_a_model_that_passes_by_its_linear_maps_is_refused_before_anything_runs(scene: Path) -> None:
    model = tiny_model("bloom")
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    model.save_pretrained(scene / "full")
    with pytest.raises(UnsupportedModelError, match="slow_but_exact to false"):
        look_up(night_config(scene, emulator={"bits": 4}))
    assert look_up(night_config(scene)).depth == 6


def test_layers_cannot_be_named_beside_a_choice(scene: Path) -> None:
    with pytest.raises(ValidationError, match=r"kept is set, but which layers stay follows from emulator\.layers"):
        night_config(scene, kept=[0, 1])


def test_a_run_by_itself_takes_what_was_chosen_and_does_not_choose() -> None:
    plan = SplitPlan(bottom=1, keep=2, top=1)
    assert kept_layers(6, plan, "cka", (1, 2)) == [1, 2]
    assert kept_layers(6, plan) == [0, 3]
    with pytest.raises(ConfigError, match=r"emulator\.layers is 'cka', but kept is not set"):
        kept_layers(6, plan, "cka")
    with pytest.raises(SplitError, match=r"name 2 different layers of 0\.\.3"):
        kept_layers(6, plan, "cka", (1, 4))


def test_layers_of_image_models_are_chosen_by_the_owners_images(tmp_path: Path) -> None:
    model, processor = tiny_image_model("vit"), ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    (tmp_path / "public").mkdir()
    generator = np.random.default_rng(1)
    for i in range(6):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "public" / f"{i}.png")
    config = {
        "model": {"name": "tiny", "source": str(tmp_path / "full")},
        "images": {"source": str(tmp_path / "public"), "workers": 0},
        "split": PLAN,
        "emulator": {"layers": "gradient", "calibration": 6},
        "training": {"steps": 1},
        "store": str(tmp_path / "owner"),
        "run": "r",
    }
    images = ImageBatches(load_images(ImageConfig(source=str(tmp_path / "public"))), processor, 4, seed=0)
    batches = [images.next_batch(), {name: tensor[:2] for name, tensor in images.next_batch().items()}]
    emulator = EmulatorConfig(layers="gradient")
    assert choosing.choose_on_worker({"distill": config})["kept"] == choose_layers(model, PLAN, emulator, batches)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_ray")
def test_one_worker_chooses_and_the_group_distils_what_it_chose(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = night_config(
        scene,
        emulator={"layers": "gradient", "calibration": 10},
        training={"steps": 1, "batch_size": 2, "lr": 1e-3},
        workers={"count": 1, "ray_storage": str(scene / "ray")},
        log="json",
    )
    kept = expected(config)
    # This process is not a worker: it is to hold no full model.
    monkeypatch.setattr(choosing, "load_full", never)
    monkeypatch.setattr(night, "choose_on_worker", never)
    answer = make_emulator.run(config)
    assert answer is not None and answer["steps"] == 1
    assert record(scene, answer)["kept"] == kept
    assert PLAN.keep == len(kept) and EmulatorConfig.model_validate(record(scene, answer)["config"]["emulator"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_bundle_of_smaller_maps_starts_from_what_the_text_shows(scene: Path, tmp_path: Path, steps: int) -> None:
    config = night_config(
        scene,
        emulator={**CKA, "attention_rank": 0.25, "mlp_channels": 0.5},
        training={"steps": steps, "batch_size": 2, "lr": 1e-3, "zero_stage": 3 if steps else 0},
        workers={"count": 1, "ray_storage": str(scene / "ray")},
        log="json",
    )
    answer = make_emulator.run(config)
    assert answer is not None
    source = BundleSource(store=str(scene / "bundles"), model="tiny", public_key=str(scene / "keys/public.pem"))
    bundle = source.open(tmp_path / "bundle")
    full, batches = load_full(config.model), calibration(config)
    plan, kept = config.split, choose_layers(full, config.split, config.emulator, batches)
    emulated = with_smaller_layers(emulate(full, plan, kept), plan, config.emulator)
    load_emulator(emulated, plan, smaller_layers(full, plan, kept, config.emulator, batches))
    with torch.no_grad():
        ours, expected = (model(batches[0]["input_ids"]).logits for model in (bundle.load_model(), emulated))
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4) == (steps == 0)
    if steps:
        assert answer["first"]["loss"] > 0 and answer["emulator_gap"]["emulated"] != answer["emulator_gap"]["dropped"]
