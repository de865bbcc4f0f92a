"""Image models as sources and as bundles, against what Transformers itself reads from the same folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    ViTImageProcessorPil,
    ViTModel,
)

from ot_ray.artifacts import load_emulated, load_full, open_bundle, open_model_source, write_bundle
from ot_ray.errors import ArtifactError, ConfigError
from ot_ray.model import (
    IMAGE_FAMILIES,
    EmulatorConfig,
    ModelConfig,
    SplitPlan,
    classes_of,
    emulate,
    family_of,
    prepare_head,
)
from ot_ray.model.packed import compress
from tests.fixtures.models import SIDE, images, tiny_image_model

DEPTH = 11
PLAN = SplitPlan(bottom=1, keep=2, top=1)
KEPT = [3, 7]
CLASSES = ("ant", "bee", "cow")
PROCESSORS = {"blip_2_vision_model": BlipImageProcessorPil, "clip": CLIPImageProcessorPil, "vit": ViTImageProcessorPil}


def _processor(model_type):
    return PROCESSORS[model_type](size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _logits(model):
    with torch.no_grad():
        return model(pixel_values=images()).logits


def _full(model_type):
    model = tiny_image_model(model_type, depth=DEPTH)
    model.config.id2label = dict(enumerate(CLASSES))
    model.config.label2id = {name: i for i, name in enumerate(CLASSES)}
    return model


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """A full model of each family with the folder that Transformers writes of it."""
    made = {}
    for model_type in IMAGE_FAMILIES:
        folder = tmp_path_factory.mktemp("owners") / model_type
        model = _full(model_type)
        model.save_pretrained(folder)
        _processor(model_type).save_pretrained(folder)
        made[model_type] = model, folder
    return made


@pytest.fixture(params=sorted(IMAGE_FAMILIES))
def owner(request, owners):
    return owners[request.param]


def _config(folder):
    return ModelConfig(name="tiny", source=str(folder))


def test_a_full_model_is_loaded_as_transformers_loads_it(owner):
    model, folder = owner
    loaded = load_full(_config(folder))
    assert not open_model_source(_config(folder)).head_is_stand_in
    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(loaded) is type(theirs)
    ours, expected = loaded.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert torch.equal(_logits(loaded), _logits(model))
    assert classes_of(loaded) == CLASSES
    assert not loaded.training


def test_an_emulated_model_reads_its_own_layers(owner):
    model, folder = owner
    emulated = load_emulated(_config(folder), PLAN, KEPT)
    assert torch.equal(_logits(emulated), _logits(emulate(model, PLAN, KEPT)))


def test_the_processor_beside_the_weights_prepares_images(owner):
    model, folder = owner
    processor = open_model_source(_config(folder)).processor()
    picture = torch.arange(3 * 20 * 20, dtype=torch.uint8).view(3, 20, 20).numpy()
    expected = _processor(model.config.model_type)(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"], expected)
    assert expected.shape == (1, 3, SIDE, SIDE)


def test_a_source_without_a_processor_says_so(tmp_path):
    tiny_image_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"its preprocessor_config\.json cannot be used: .*beside its weights"):
        open_model_source(_config(tmp_path)).processor()
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "os"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"its preprocessor_config\.json cannot be used: .*beside its weights"):
        open_model_source(_config(tmp_path)).processor()


def test_a_tower_without_a_head_gets_one_of_zeros(tmp_path):
    vit, clip = tiny_image_model("vit"), tiny_image_model("clip")
    tower = ViTModel(vit.config, add_pooling_layer=True)
    tower.load_state_dict(vit.vit.state_dict(), strict=False)
    tower.save_pretrained(tmp_path / "vit")
    whole = CLIPModel(clip.config)
    whole.vision_model.load_state_dict(clip.vision_model.state_dict())
    whole.save_pretrained(tmp_path / "clip")
    for name, model in (("vit", vit), ("clip", clip)):
        assert open_model_source(_config(tmp_path / name)).head_is_stand_in
        loaded = load_full(_config(tmp_path / name))
        assert not _logits(loaded).any()
        prepare_head(loaded, CLASSES, seed=1)
        prepare_head(model, CLASSES, seed=1)
        assert torch.equal(_logits(loaded), _logits(model))


def test_blip_2s_vision_tower_is_found_within_it(tmp_path):
    model, small = tiny_image_model("blip_2_vision_model"), {"num_hidden_layers": 1, "num_attention_heads": 1}
    queries = {**small, "hidden_size": 8, "intermediate_size": 8, "encoder_hidden_size": 32, "vocab_size": 9}
    text = {**small, "model_type": "opt", "hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "vocab_size": 9}
    whole = Blip2ForConditionalGeneration(
        Blip2Config(vision_config=model.config.to_dict(), qformer_config=queries, text_config=text, num_query_tokens=2)
    )
    whole.vision_model.load_state_dict(model.vision_model.state_dict())
    whole.save_pretrained(tmp_path)
    loaded = load_full(_config(tmp_path))
    for classifier in (loaded, model):
        prepare_head(classifier, CLASSES, seed=1)
    assert torch.equal(_logits(loaded), _logits(model))


def _write(folder, model_type, **fields):
    model = _full(model_type)
    model.config._name_or_path = "/secret/place"
    model.config.original_depth = DEPTH
    if model_type == "clip":
        model.config.text_config.num_hidden_layers = DEPTH
        model.config.vision_config.original_depth = DEPTH
    emulated = emulate(model, PLAN, KEPT)
    settings = {"name": "tiny", "version": "1", "card": "# Tiny\n", "recommended": {}, **fields}
    write_bundle(folder, emulated, None, PLAN, processor=_processor(model_type), **settings)
    return emulated


@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_a_bundle_is_a_folder_that_transformers_opens(model_type, tmp_path):
    emulated = _write(tmp_path / "bundle", model_type)
    bundle = open_bundle(tmp_path / "bundle")
    theirs = AutoModelForImageClassification.from_pretrained(bundle.folder).eval()
    assert torch.equal(_logits(theirs), _logits(emulated))
    assert torch.equal(_logits(bundle.load_model()), _logits(emulated))
    assert classes_of(bundle.load_model()) == CLASSES
    processor = AutoImageProcessor.from_pretrained(bundle.folder, backend="pil")
    assert type(bundle.load_processor()) is type(processor) is PROCESSORS[model_type]
    assert bundle.load_processor().to_dict() == processor.to_dict()


@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_a_compressed_emulator_is_opened_as_it_was_written(model_type, tmp_path):
    emulated = emulate(_full(model_type), PLAN, KEPT)
    before = _logits(emulated)
    emulated = compress(emulated, PLAN, EmulatorConfig(sparsity=0.5, bits=4, group_size=16)).eval()
    write_bundle(tmp_path / "b", emulated, None, PLAN, name="a", version="1", card="", recommended={})
    bundle = open_bundle(tmp_path / "b")
    assert torch.equal(_logits(bundle.load_model()), _logits(emulated))
    assert torch.equal(_logits(AutoModelForImageClassification.from_pretrained(bundle.folder)), _logits(emulated))
    assert not torch.allclose(_logits(emulated), before)


@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_a_bundle_tells_nothing_of_the_full_model(model_type, tmp_path):
    _write(tmp_path / "bundle", model_type)
    for path in (tmp_path / "bundle").iterdir():
        text = path.read_bytes()
        assert b"secret" not in text
        assert b"original_depth" not in text
        if path.suffix == ".json" and path.name != "manifest.json":
            assert DEPTH not in _numbers(json.loads(text)), path.name


def _numbers(value):
    if isinstance(value, dict):
        return {number for item in value.values() for number in _numbers(item)}
    if isinstance(value, list):
        return {number for item in value for number in _numbers(item)}
    return {value} if isinstance(value, int | float) else set()


@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_the_head_lies_with_the_adapter_and_stands_in_the_manifest(model_type, tmp_path):
    emulated = _write(tmp_path / "bundle", model_type)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert [(entry.name, entry.shape) for entry in manifest.head] == [
        ("classifier.bias", (3,)),
        ("classifier.weight", (3, 32)),
    ]
    stored = load_file(tmp_path / "bundle" / "adapter.safetensors")
    assert set(stored) == {entry.name for entry in (*manifest.adapter, *manifest.head)}
    assert torch.equal(stored["classifier.weight"], emulated.classifier.weight)
    prefix = family_of(emulated).layers
    assert all(entry.name.startswith((f"{prefix}.0.", f"{prefix}.3.")) for entry in manifest.adapter)
    with safe_open(tmp_path / "bundle" / "emulator.safetensors", "pt") as file:
        assert "classifier.weight" not in file.keys()  # noqa: SIM118 - it is no dictionary


def test_a_bundle_without_a_processor_says_what_to_do(tmp_path):
    emulated = emulate(_full("vit"), PLAN, KEPT)
    write_bundle(tmp_path / "b", emulated, None, PLAN, name="a", version="1", card="", recommended={})
    with pytest.raises(ArtifactError, match="pass a processor to write_bundle"):
        open_bundle(tmp_path / "b").load_processor()


def test_a_processor_that_cannot_be_used_is_the_bundles_fault(tmp_path):
    _write(tmp_path / "bundle", "vit")
    bundle = open_bundle(tmp_path / "bundle")
    (bundle.folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=r"^bundle .*preprocessor_config\.json cannot be .*; fetch the bundle again$"
    ):
        bundle.load_processor()
