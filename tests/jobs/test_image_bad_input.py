"""What is wrong with images, classes or the kind of data is said by each verb before anything is trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from jobs import evaluate, make_emulator, plug_in, tune
from jobs.command import config_file
from ot_ray.artifacts import open_bundle, write_bundle
from ot_ray.config import load
from ot_ray.errors import OTRayError, UnsupportedModelError
from ot_ray.model import SplitPlan, emulate
from serve.config import ServeConfig
from serve.engine.loading import load_backend
from tests.fixtures.models import SIDE, tiny_image_model
from tests.jobs.scene import build

PLAN = SplitPlan(bottom=1, keep=1, top=1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image model with its bundle, an adapter tuned for two kinds of tree, and images of other things."""
    place = tmp_path_factory.mktemp("images")
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    full = tiny_image_model("vit", depth=4)
    full.save_pretrained(place / "full")
    processor.save_pretrained(place / "full")
    write_bundle(
        place / "bundle",
        emulate(full, PLAN, [0]),
        None,
        PLAN,
        name="trees",
        version="1",
        card="",
        recommended={},
        processor=processor,
    )
    draw = np.random.default_rng(0)
    for part, names in {"trees": ("ash", "birch"), "fish": ("cod", "eel"), "one": ("ash",)}.items():
        for name in names:
            for number in range(3):
                folder = place / part / name
                folder.mkdir(parents=True, exist_ok=True)
                pixels = draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (place / "broken/ash").mkdir(parents=True)
    (place / "broken/ash/a.png").write_bytes(b"no image")
    (place / "broken/birch").mkdir()
    (place / "broken/birch/b.png").write_bytes(b"")
    tune.run(tune.TuneConfig.model_validate(tuning(place)))
    return place


def tuning(place: Path, images: str = "trees", **changes: object) -> dict[str, object]:
    return {
        "bundle": {"folder": str(place / "bundle")},
        "images": {"source": str(place / images)},
        "training": {"steps": 1, "batch_size": 2},
        "output": str(place / "adapter"),
        **changes,
    }


CONFIGS = {
    tune: tune.TuneConfig,
    evaluate: evaluate.EvaluateConfig,
    plug_in: plug_in.PlugInConfig,
    make_emulator: make_emulator.MakeEmulatorConfig,
}


def refused(verb: ModuleType, values: dict[str, object]) -> str:
    with pytest.raises(OTRayError) as caught:
        verb.run(CONFIGS[verb].model_validate(values))
    return str(caught.value)


def test_images_that_do_not_open(sound: Path, tmp_path: Path) -> None:
    text = refused(tune, tuning(sound, "broken", output=str(tmp_path / "out")))
    assert "2 of 2 images do not open" in text and "a.png" in text and "b.png" in text
    assert not (tmp_path / "out").exists()


def test_a_folder_of_splits_is_no_folder_of_classes(sound: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(sound / "trees", tmp_path / "data" / part)
    values = tuning(sound, str(tmp_path / "data"), output=str(tmp_path / "out"))
    assert f"say images.source={tmp_path}/data/train" in refused(tune, values)


def test_one_class_is_too_few(sound: Path, tmp_path: Path) -> None:
    assert "use images of at least two classes" in refused(tune, tuning(sound, "one", output=str(tmp_path / "out")))


def test_validation_images_of_other_classes(sound: Path, tmp_path: Path) -> None:
    other = {"source": str(sound / "fish")}
    text = refused(tune, tuning(sound, validation_images=other, output=str(tmp_path / "out")))
    assert "of classes cod, eel, which" in text and "its classes are ash, birch" in text


def test_text_for_an_image_model_and_images_for_a_language_model(sound: Path, tmp_path: Path) -> None:
    build(tmp_path)
    text = {"source": str(tmp_path / "train.jsonl")}
    out = str(tmp_path / "out")
    found = refused(tune, {**tuning(sound, output=out), "images": None, "data": text})
    assert "data is set, but a model of type vit takes images; set images.source" in found
    found = refused(tune, tuning(sound, bundle={"folder": str(tmp_path / "bundle")}, output=out))
    assert "images is set, but a model of type opt takes text; set data" in found
    for values, message in (
        ({"data": text}, "both are set"),
        ({"images": None}, "neither is set"),
        ({"validation": text}, "set validation_images"),
    ):
        with pytest.raises(ValueError, match=message):
            tune.TuneConfig.model_validate({**tuning(sound, output=out), **values})


def test_the_shipped_settings_serve_images_from_the_command_line(sound: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = [f"bundle.folder={sound}/bundle", f"images.source={sound}/trees", f"output={out}", "training.steps=20"]
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.tune", *settings], capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["images"] == 6 and (out / "manifest.json").is_file()


def test_the_shipped_settings_say_how_images_take_the_place_of_text() -> None:
    def loaded(verb: ModuleType, name: str, *overrides: str) -> object:
        return load(CONFIGS[verb], config_file(name), overrides)

    with pytest.raises(OTRayError, match=r"neither is set; set data.source=\.\.\. or images.source=\.\.\."):
        loaded(tune, "tune.yaml", "bundle.folder=b", "output=o")
    with pytest.raises(OTRayError, match="both are set; leave one out: data=null or images=null"):
        loaded(make_emulator, "make_emulator.yaml", "images.source=photos")
    with pytest.raises(OTRayError, match="set validation_images, and validation=null"):
        loaded(make_emulator, "make_emulator.yaml", "images.source=photos", "data=null")
    overrides = ["images.source=photos", "data=null", "validation=null", "gate={}", "training.steps=0"]
    assert loaded(make_emulator, "make_emulator.yaml", *overrides)
    assert loaded(make_emulator, "make_emulator_images.yaml", "training.steps=0")
    assert loaded(make_emulator, "make_emulator.yaml", "training.steps=0")


def evaluation(place: Path, tmp_path: Path, **changes: object) -> dict[str, object]:
    return {
        "model": {"name": "trees", "source": str(place / "full")},
        "bundle": {"folder": str(place / "bundle")},
        "adapter": str(place / "adapter"),
        "train_images": {"source": str(place / "trees")},
        "test_images": {"source": str(place / "trees")},
        "training": {"steps": 1, "batch_size": 2},
        "output": str(tmp_path / "report"),
        **changes,
    }


def test_evaluating_on_classes_that_the_adapter_does_not_know(sound: Path, tmp_path: Path) -> None:
    fish = {"source": str(sound / "fish")}
    text = refused(evaluate, evaluation(sound, tmp_path, train_images=fish, test_images=fish))
    assert "of classes cod, eel, which the adapter's head does not know: its classes are ash, birch" in text
    text = refused(evaluate, evaluation(sound, tmp_path, test_images=fish))
    assert "a head made of train_images does not know: its classes are ash, birch" in text


def test_evaluating_a_bundle_of_another_model(sound: Path, tmp_path: Path) -> None:
    other = {"name": "flowers", "source": str(sound / "full")}
    text = refused(evaluate, evaluation(sound, tmp_path, model=other))
    assert "the bundle is of model 'trees', but model.name is 'flowers'" in text


def test_evaluating_text_on_an_image_model(sound: Path, tmp_path: Path) -> None:
    build(tmp_path)
    text = {"source": str(tmp_path / "train.jsonl")}
    values = evaluation(sound, tmp_path, train_images=None, test_images=None, train=text, test=text)
    assert "test is set, but a model of type vit takes images" in refused(evaluate, values)
    with pytest.raises(ValueError, match="train_images is required with test_images"):
        evaluate.EvaluateConfig.model_validate(evaluation(sound, tmp_path, train_images=None))
    texts: tuple[dict[str, object], ...] = ({}, {"train": text, "test": text})
    for given in texts:
        with pytest.raises(ValueError, match="train_images is set, but test_images is not"):
            evaluate.EvaluateConfig.model_validate(evaluation(sound, tmp_path, test_images=None, **given))


def test_plugging_in_on_classes_that_the_adapter_does_not_know(sound: Path, tmp_path: Path) -> None:
    values: dict[str, object] = {
        "model": {"name": "trees", "source": str(sound / "full")},
        "bundle": {"folder": str(sound / "bundle")},
        "adapter": str(sound / "adapter"),
        "tenant": "acme",
        "store": str(tmp_path / "registry"),
        "images": {"source": str(sound / "fish")},
    }
    assert "which the adapter's head does not know: its classes are ash, birch" in refused(plug_in, values)
    assert not (tmp_path / "registry").exists()


def making(place: Path, tmp_path: Path, **changes: object) -> dict[str, object]:
    return {
        "model": {"name": "trees", "source": str(place / "full")},
        "split": PLAN.model_dump(),
        "images": {"source": str(place / "trees")},
        "training": {"steps": 1, "batch_size": 2},
        "store": str(tmp_path / "owner"),
        "workers": {"count": 1},
        **changes,
    }


def test_making_an_emulator_of_what_does_not_fit(sound: Path, tmp_path: Path) -> None:
    broken = {"source": str(sound / "broken")}
    assert "2 of 2 images do not open" in refused(make_emulator, making(sound, tmp_path, images=broken))
    held_out = {"source": str(sound / "trees")}
    text = refused(make_emulator, making(sound, tmp_path, validation_images=held_out))
    assert "of classes ash, birch, which the full model's head does not know: its classes are LABEL_0" in text
    words = {"source": str(tmp_path / "words.txt")}
    Path(words["source"]).write_text("words")
    text = refused(make_emulator, making(sound, tmp_path, images=None, data=words))
    assert "data is set, but a model of type vit takes images" in text
    with pytest.raises(ValueError, match="images are distilled by the middle's output alone"):
        make_emulator.MakeEmulatorConfig.model_validate(making(sound, tmp_path, loss={"kd_weight": 2}))


def test_the_text_service_does_not_serve_image_models(sound: Path) -> None:
    config = ServeConfig.model_validate({"model": {"name": "trees", "source": str(sound / "full")}})
    with pytest.raises(UnsupportedModelError, match="of type vit, which takes images; this service answers with text"):
        load_backend(config)


def test_the_adapter_s_classes_stand_in_its_manifest(sound: Path) -> None:
    assert open_bundle(sound / "bundle").manifest.head
    assert '"birch"' in (sound / "adapter/manifest.json").read_text()
