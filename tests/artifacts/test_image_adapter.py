"""Adapters of image models on their way back: written, inspected, plugged in, with the customer's own classes."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ot_ray.artifacts import inspect_adapter, open_bundle, plain_state, write_adapter, write_bundle
from ot_ray.artifacts.folder import describe_files, list_files
from ot_ray.artifacts.inspection import InspectionLimits
from ot_ray.artifacts.manifest import to_text
from ot_ray.errors import AdapterRejectedError, ArtifactError
from ot_ray.model import (
    IMAGE_FAMILIES,
    METHODS,
    ImageModel,
    LoraSettings,
    SplitPlan,
    adapter_state,
    classes_of,
    emulate,
    merged_adapter_state,
    plug_in,
    prepare_head,
    prepare_tuning,
)
from ot_ray.model.tuning import BottleneckSettings
from tests.fixtures.models import images, tiny_image_model, tiny_model

PLAN = SplitPlan(bottom=1, keep=2, top=1)
CLASSES = ("rose", "tulip", "daisy", "lily", "iris")
LABELS = torch.tensor([4, 0, 2])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The full model and the bundle of each family."""
    made = {}
    for model_type in IMAGE_FAMILIES:
        full = tiny_image_model(model_type)
        folder = tmp_path_factory.mktemp("bundles") / model_type
        emulated = emulate(full, PLAN, [0, 3])
        write_bundle(folder, emulated, None, PLAN, name="tiny", version="1", card="", recommended={})
        made[model_type] = full, open_bundle(folder)
    return made


def _tuned(bundle, method):
    """The bundle's model after three steps on other classes than the owner's."""
    model = bundle.load_model()
    prepare_head(model, CLASSES, seed=2)
    torch.manual_seed(4)
    tuned = prepare_tuning(model, PLAN, method, LoraSettings(rank=3), BottleneckSettings(size=5))
    module = ImageModel(tuned)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        module(pixel_values=images(), labels=LABELS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def _written(folder, bundle, method, tuned=None):
    tuned = tuned if tuned is not None else _tuned(bundle, method)
    write_adapter(folder, tuned, bundle.manifest, method=method, steps=3, learning_rate=1e-2)
    return tuned


def _logits(model):
    with torch.no_grad():
        return (model.get_base_model() if isinstance(model, PeftModel) else model)(pixel_values=images()).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_what_was_tuned_comes_back_and_is_plugged_in(bundles, model_type, method, tmp_path):
    full, bundle = bundles[model_type]
    before = _logits(full)
    tuned = _written(tmp_path / "adapter", bundle, method)
    returned = inspect_adapter(tmp_path / "adapter", bundle.manifest)
    assert returned.manifest.classes == CLASSES
    state = plain_state(returned, adapter_state(full, PLAN))
    # Every trained tensor came along, the head with all methods: what was tuned, put into the bundle's own
    # emulated model, is the tuned model.
    again = plug_in(bundle.load_model(), PLAN, state, returned.manifest.classes)
    torch.testing.assert_close(_logits(again), _logits(tuned), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(_logits(again)[:, :3], _logits(bundle.load_model()))
    # The full model with it: the owner's path and the tuned model's own state agree.
    plugged = plug_in(full, PLAN, state, returned.manifest.classes)
    expected = plug_in(full, PLAN, merged_adapter_state(tuned, PLAN), CLASSES)
    torch.testing.assert_close(_logits(plugged), _logits(expected), rtol=1e-4, atol=1e-4)
    assert classes_of(plugged) == CLASSES
    assert torch.equal(_logits(full), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_head_is_trained_with_every_method(method):
    tuned = prepare_tuning(tiny_image_model("vit"), PLAN, method)
    learning = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    outside = {name.removeprefix("base_model.model.") for name in learning if ".layers." not in name}
    assert outside == {"classifier.weight", "classifier.bias"}
    assert {name.split(".layers.")[1].split(".")[0] for name in learning if ".layers." in name} == {"0", "5"}


def test_a_lora_folder_is_peft_s_own(bundles, tmp_path):
    _, bundle = bundles["vit"]
    tuned = _written(tmp_path / "adapter", bundle, "lora")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"] is None
    assert config["task_type"] is None
    model = bundle.load_model()
    prepare_head(model, CLASSES, seed=0)
    model.load_state_dict(load_file(tmp_path / "adapter" / "head.safetensors"), strict=False)
    opened = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(opened(pixel_values=images()).logits, _logits(tuned))


def test_two_classes_as_the_owners_return_as_well(bundles, tmp_path):
    full, bundle = bundles["clip"]
    model = prepare_tuning(bundle.load_model(), PLAN, "full")
    _written(tmp_path / "adapter", bundle, "full", model)
    returned = inspect_adapter(tmp_path / "adapter", bundle.manifest)
    assert returned.manifest.classes == classes_of(full)
    assert torch.equal(_logits(plug_in(full, PLAN, plain_state(returned, adapter_state(full, PLAN)))), _logits(full))


def test_an_owners_classes_may_share_a_name_as_imagenets_cranes_do_and_a_customers_may_not(tmp_path):
    full = tiny_image_model("vit")
    full.config.id2label = {0: "crane", 1: "ibis", 2: "crane"}
    write_bundle(
        tmp_path / "b", emulate(full, PLAN, [0, 3]), None, PLAN, name="a", version="1", card="", recommended={}
    )
    bundle = open_bundle(tmp_path / "b")
    model = bundle.load_model()
    assert classes_of(model) == ("crane", "ibis", "crane")
    with pytest.raises(ArtifactError, match="class 'crane' stands twice; give each class one name"):
        _written(tmp_path / "adapter", bundle, "bitfit", prepare_tuning(model, PLAN, "bitfit"))
    assert not (tmp_path / "adapter").exists()
    model.config.id2label[2] = "crane, a machine"
    _written(tmp_path / "adapter", bundle, "bitfit", model)
    assert inspect_adapter(tmp_path / "adapter", bundle.manifest).manifest.classes[2] == "crane, a machine"


def _change(folder, **changes):
    """Rewrite the manifest so that it fits the files again, with other values."""
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    files = {name: entry.model_dump() for name, entry in describe_files(folder, list_files(folder)[0]).items()}
    (folder / "manifest.json").write_text(json.dumps({**values, "files": files, **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": None}, "classes is missing"),
        ({"classes": ["a", "b", "a", "d", "e"]}, r"class 'a' stands twice; give each class one name"),
        ({"classes": ["one"]}, r"classes names 1; use 2\.\.6"),
        ({"classes": [f"c{i}" for i in range(7)]}, r"classes names 7; use 2\.\.6"),
        ({"classes": ["a", "b", "c", "d"]}, r"classifier\.bias has shape \(5,\), not \(4,\)"),
        ({"classes": ["a", "b", "c", "d", "e\n"]}, r"classes\.4 .*use 1 to 256 characters"),
        ({"classes": ["a", "b", "c", "d", "\u202ee"]}, r"classes\.4 .*use 1 to 256 characters"),
        ({"classes": ["a", "b", "c", "d", "e" * 257]}, r"classes\.4 .*use 1 to 256 characters"),
        ({"classes": ["a", "b", "c", "d", ""]}, r"classes\.4 .*use 1 to 256 characters"),
    ],
)
def test_classes_that_do_not_fit_are_refused(bundles, changes, reason, tmp_path):
    _, bundle = bundles["vit"]
    _written(tmp_path / "adapter", bundle, "bitfit")
    _change(tmp_path / "adapter", **changes)
    with pytest.raises(AdapterRejectedError, match=reason):
        inspect_adapter(tmp_path / "adapter", bundle.manifest, InspectionLimits(max_classes=6))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda head: {**head, "classifier.bias": torch.full((5,), torch.nan)}, "5 values that are not finite"),
        (lambda head: {**head, "classifier.weight": torch.zeros(5, 31)}, r"shape \(5, 31\), not \(5, 32\)"),
        (lambda head: {**head, "classifier.weight": torch.zeros(4, 32)}, r"shape \(4, 32\), not \(5, 32\)"),
        (lambda head: {"classifier.bias": head["classifier.bias"]}, r"classifier\.weight is missing"),
        (lambda head: {**head, "vit.layers.1.extra": torch.zeros(1)}, "is not part of the adapter"),
        (lambda head: {**head, "classifier.bias": torch.zeros(5, dtype=torch.int32)}, "has dtype I32"),
    ],
)
def test_heads_that_do_not_fit_are_refused(bundles, spoil, reason, tmp_path):
    _, bundle = bundles["vit"]
    _written(tmp_path / "adapter", bundle, "lora")
    path = tmp_path / "adapter" / "head.safetensors"
    head = load_file(path)
    path.unlink()
    save_file(spoil({name: tensor.clone() for name, tensor in head.items()}), path)
    _change(tmp_path / "adapter")
    with pytest.raises(AdapterRejectedError, match=reason):
        inspect_adapter(tmp_path / "adapter", bundle.manifest)


def test_an_adapter_without_its_head_is_refused(bundles, tmp_path):
    _, bundle = bundles["vit"]
    _written(tmp_path / "adapter", bundle, "full")
    (tmp_path / "adapter" / "head.safetensors").unlink()
    with pytest.raises(AdapterRejectedError, match=r"head\.safetensors"):
        inspect_adapter(tmp_path / "adapter", bundle.manifest)
    _change(tmp_path / "adapter")
    with pytest.raises(AdapterRejectedError, match=r"the files of full are adapter\.safetensors, head\.safetensors"):
        inspect_adapter(tmp_path / "adapter", bundle.manifest)


def test_a_head_and_classes_for_a_language_model_are_refused(tmp_path):
    model = emulate(tiny_model("opt"), PLAN, [0, 3])
    write_bundle(tmp_path / "b", model, None, PLAN, name="text", version="1", card="", recommended={})
    bundle = open_bundle(tmp_path / "b")
    assert b'"head"' not in to_text(bundle.manifest)
    tuned = prepare_tuning(bundle.load_model(), PLAN, "full")
    write_adapter(tmp_path / "a", tuned, bundle.manifest, method="full", steps=1, learning_rate=0.1)
    save_file({"classifier.weight": torch.zeros(2, 32)}, tmp_path / "a" / "head.safetensors")
    _change(tmp_path / "a", classes=["a", "b"])
    with pytest.raises(AdapterRejectedError) as refused:
        inspect_adapter(tmp_path / "a", bundle.manifest)
    assert "of a model without" in str(refused.value)
    assert "the files of full are adapter.safetensors" in str(refused.value)


def test_heads_that_should_not_be_sent_are_refused_as_they_are_written(bundles, tmp_path):
    _, bundle = bundles["vit"]
    model = prepare_tuning(bundle.load_model(), PLAN, "full")
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    with pytest.raises(ArtifactError, match=r"classifier\.bias holds values that are not finite"):
        _written(tmp_path / "one", bundle, "full", model)
    model.classifier = torch.nn.Linear(32, 3, bias=False)
    with pytest.raises(ArtifactError, match="head does not fit bundle"):
        _written(tmp_path / "two", bundle, "full", model)
    assert not list(tmp_path.iterdir())
