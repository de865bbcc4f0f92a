"""Image classifiers: split, emulate, distil and plug in, against the plain Transformers models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification

from ot_ray.errors import DataError, SplitError, UnsupportedModelError
from ot_ray.model import (
    DistillOptions,
    ImageDistillModel,
    ImageModel,
    SplitPlan,
    adapter_state,
    classes_of,
    depth_of,
    emulate,
    layer_config,
    load_emulator,
    plug_in,
    prepare_head,
)
from ot_ray.model.families import head_of, layers_of
from ot_ray.model.skeleton import empty_model, fill
from ot_ray.model.tuning import prepare_tuning
from tests.fixtures.models import images, tiny_image_model, tiny_model

PLAN = SplitPlan(bottom=2, keep=2, top=1)
KEPT = [0, 2]
LABELS = torch.tensor([0, 2, 1])


def _logits(model):
    with torch.no_grad():
        return model(pixel_values=images()).logits


def _output_of(model, position):
    """Hidden states after layer `position`, taken by a hook, and the logits."""
    seen = []
    handle = layers_of(model)[position].register_forward_hook(lambda m, a, out: seen.append(out))
    logits = model(pixel_values=images()).logits
    handle.remove()
    return seen[0], logits


def _plain_loss(full, emulated):
    """The distance of the two middles' outputs, from two models apart, one row at a time."""
    with torch.no_grad():
        teacher, _ = _output_of(full, 4)
    student, _ = _output_of(emulated, 3)
    rows = [((t - s) / t.pow(2).mean().sqrt()).pow(2).mean() for t, s in zip(teacher, student, strict=True)]
    return torch.stack(rows).mean()


@pytest.mark.parametrize(
    "plan",
    [PLAN, SplitPlan(bottom=0, keep=3, top=1), SplitPlan(bottom=1, keep=2, top=0)],
    ids=str,
)
def test_untouched_adapter_gives_the_original_logits_bit_for_bit(image_model, plan):
    before = _logits(image_model)
    state = adapter_state(emulate(image_model, plan, range(plan.keep)), plan)
    assert torch.equal(_logits(plug_in(image_model, plan, state)), before)
    assert torch.equal(_logits(image_model), before)


def test_keeping_all_of_the_middle_is_the_full_model(image_model):
    emulated = emulate(image_model, SplitPlan(bottom=1, keep=4, top=1), range(4))
    with torch.no_grad():
        full = image_model(pixel_values=images(), output_hidden_states=True)
        ours = emulated(pixel_values=images(), output_hidden_states=True)
    assert len(full.hidden_states) == 7
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, full.hidden_states, strict=True))
    assert torch.equal(ours.logits, full.logits)


def test_emulated_model_is_what_transformers_builds_from_its_config(image_model, tmp_path):
    emulated = emulate(image_model, SplitPlan(bottom=1, keep=2, top=1), [0, 3])
    emulated.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert depth_of(reloaded) == 4
    assert torch.equal(_logits(reloaded), _logits(emulated))
    # An independent computation: a model built fresh from the source's chosen layers.
    fresh = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    fresh.load_state_dict(image_model.state_dict(), strict=False)
    for target, source in zip(layers_of(fresh), [0, 1, 4, 5], strict=True):
        target.load_state_dict(layers_of(image_model)[source].state_dict())
    assert torch.equal(_logits(emulated), _logits(fresh))
    assert layer_config(image_model.config).num_hidden_layers == 6, "the full model's own configuration has changed"


def test_eva_clips_logits_are_its_head_on_the_mean_of_the_towers_patches():
    model = tiny_image_model("blip_2_vision_model")
    with torch.no_grad():
        tokens = model.vision_model(images()).last_hidden_state
        expected = tokens[:, 1:].mean(1) @ model.classifier.weight.T + model.classifier.bias
        output = model(images(), labels=LABELS)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, LABELS), rtol=1e-5, atol=1e-6)


def test_the_head_belongs_to_the_adapter(image_model):
    state = adapter_state(image_model, PLAN)
    assert {name for name in state if not name.startswith("layers.")} == {"head.weight", "head.bias"}
    assert torch.equal(state["head.weight"], head_of(image_model).weight)
    moved = {**state, "head.bias": state["head.bias"] + 1.0}
    plugged = plug_in(image_model, PLAN, moved)
    torch.testing.assert_close(_logits(plugged), _logits(image_model) + 1.0, rtol=1e-5, atol=1e-5)
    changed = [n for n, p in plugged.named_parameters() if p.data_ptr() != image_model.get_parameter(n).data_ptr()]
    assert all(name.startswith("classifier.") or any(f"layers.{i}." in name for i in (0, 1, 5)) for name in changed)


def test_a_head_of_other_classes_is_plugged_in_with_their_names(image_model):
    before, names = classes_of(image_model), ("ant", "bee", "cow", "dog", "elk")
    tuned = emulate(image_model, PLAN, KEPT)
    prepare_head(tuned, names, seed=3)
    assert classes_of(tuned) == names
    assert tuned.config.num_labels == 5
    plugged = plug_in(image_model, PLAN, adapter_state(tuned, PLAN), names)
    assert _logits(plugged).shape == (3, 5)
    assert plugged.config.id2label == dict(enumerate(names))
    assert plugged.config.label2id["elk"] == 4
    assert classes_of(plug_in(image_model, PLAN, adapter_state(tuned, PLAN)))[4] == "LABEL_4"
    # The owner's model is as it was.
    assert classes_of(image_model) == before
    assert _logits(image_model).shape == (3, 3)
    # The head's values are those of the customer's, on the full model's features.
    reference = copy.deepcopy(image_model)
    prepare_head(reference, names, seed=3)
    assert torch.equal(_logits(plugged), _logits(reference))


def test_a_fresh_head_is_drawn_from_its_seed_alone():
    one, other, third = (tiny_image_model("vit", seed=seed) for seed in (1, 2, 1))
    torch.manual_seed(0)
    prepare_head(one, ["a", "b"], seed=7)
    after_one = torch.rand(())
    prepare_head(other, ["a", "b"], seed=7)
    prepare_head(third, ["a", "b"], seed=8)
    assert torch.equal(head_of(one).weight, head_of(other).weight)
    assert not torch.equal(head_of(one).weight, head_of(third).weight)
    assert 0.01 < head_of(one).weight.std() < 0.04
    assert not head_of(one).bias.any()
    torch.manual_seed(0)
    assert torch.equal(torch.rand(()), after_one), "the caller's random numbers have moved"


def test_heads_that_cannot_be_are_refused():
    model = tiny_image_model("vit")
    with pytest.raises(DataError, match="at least two"):
        prepare_head(model, ["a"], seed=0)
    with pytest.raises(DataError, match="'b' stand twice"):
        prepare_head(model, ["a", "b", "b"], seed=0)
    for unsound in ("tab\tname", " blank", "x" * 257, "", "\u202eevil"):
        with pytest.raises(DataError, match="cannot be written down"):
            prepare_head(model, ["a", unsound], seed=0)
    with pytest.raises(UnsupportedModelError, match=r"'opt', which has no classes; use one of: blip_2"):
        prepare_head(tiny_model("opt"), ["a", "b"], seed=0)
    state = adapter_state(model, PLAN)
    with pytest.raises(SplitError, match=r"head\.bias has shape \(3,\), not \(4,\)"):
        plug_in(model, PLAN, {**state, "head.weight": torch.zeros(4, 32)})
    with pytest.raises(SplitError, match=r"head\.weight has shape \(3, 31\), not \(3, 32\)"):
        plug_in(model, PLAN, {**state, "head.weight": torch.zeros(3, 31)})
    with pytest.raises(SplitError, match=r"head\.weight is missing"):
        plug_in(model, PLAN, {name: tensor for name, tensor in state.items() if name != "head.weight"})
    with pytest.raises(SplitError, match=r"head\.extra is not part"):
        plug_in(model, PLAN, {**state, "head.extra": torch.zeros(1)})
    with pytest.raises(SplitError, match="classes names 2, but the adapter's head has 3 rows"):
        plug_in(model, PLAN, state, ["a", "b"])
    text = tiny_model("llama")
    with pytest.raises(SplitError, match="has 0 rows"):
        plug_in(text, PLAN, adapter_state(text, PLAN), ["a", "b"])


def test_a_model_without_classes_is_refused():
    config = tiny_image_model("clip").config
    config.id2label = {}
    with pytest.raises(UnsupportedModelError, match="names no class"):
        empty_model(config, torch.float32)


@pytest.mark.parametrize(
    ("model_type", "layers", "width"), [("vit", 12, 768), ("clip", 12, 768), ("blip_2_vision_model", 39, 1408)]
)
def test_models_of_the_real_size_are_built_without_weights(model_type, layers, width):
    model = empty_model(AutoConfig.for_model(model_type), torch.bfloat16)
    assert depth_of(model) == layers
    assert head_of(model).in_features == width
    assert all(parameter.is_meta for parameter in model.parameters())
    plan = SplitPlan(bottom=4, keep=2, top=4)
    assert depth_of(emulate(model, plan, [0, 2], share=True)) == 10


def test_one_pass_equals_teacher_and_student_apart(image_model):
    expected = _plain_loss(image_model, emulate(image_model, PLAN, KEPT))
    output = ImageDistillModel(image_model, PLAN, KEPT)(pixel_values=images(), labels=LABELS)
    assert output.keys() == {"loss", "kd_loss"}
    torch.testing.assert_close(output["loss"], expected, rtol=1e-5, atol=0)
    assert torch.equal(output["kd_loss"], output["loss"].detach())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_emulator_learns_and_its_gradients_are_autograds(image_model, checkpointing):
    emulated = emulate(image_model, PLAN, KEPT)
    _plain_loss(image_model, emulated).backward()
    expected = [parameter.grad for layer in layers_of(emulated)[2:4] for parameter in layer.parameters()]
    distill = ImageDistillModel(image_model, PLAN, KEPT, DistillOptions(checkpointing=checkpointing))
    distill(pixel_values=images())["loss"].backward()
    learning = [parameter for parameter in distill.parameters() if parameter.requires_grad]
    assert len(learning) == len(expected)
    assert all(parameter.grad is None for parameter in distill.parameters() if not parameter.requires_grad)
    for parameter, gradient in zip(learning, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-4, atol=2e-5)


def test_a_training_pass_leaves_the_top_adapter_out_and_an_evaluation_does_not(image_model):
    distill = ImageDistillModel(image_model, PLAN, KEPT)
    ran = []
    layers_of(distill.model)[-1].layer.register_forward_hook(lambda m, a, out: ran.append(True))
    distill(pixel_values=images())
    assert not ran
    distill(pixel_values=images(), labels=LABELS, setting="full")
    assert ran


@pytest.mark.parametrize("setting", ["full", "emulated"])
def test_one_lane_alone_is_the_model_of_its_name(image_model, setting):
    alone = image_model if setting == "full" else emulate(image_model, PLAN, KEPT)
    logits = _logits(alone)
    output = ImageDistillModel(image_model, PLAN, KEPT)(pixel_values=images(), labels=LABELS, setting=setting)
    torch.testing.assert_close(output["nll"], F.cross_entropy(logits, LABELS, reduction="sum"), rtol=1e-5, atol=0)
    assert output["correct"].item() == (logits.argmax(-1) == LABELS).sum().item()
    assert output["tokens"].item() == 3
    assert not output["nll"].requires_grad


def test_labels_that_are_no_class_of_the_head_are_refused():
    distill = ImageDistillModel(tiny_image_model("vit"), PLAN, KEPT)
    with pytest.raises(DataError, match=r"up to 3, but the model's head has classes 0\.\.2"):
        distill(pixel_values=images(), labels=torch.tensor([0, 3, 1]), setting="full")
    with pytest.raises(DataError, match="missing"):
        distill(pixel_values=images(), setting="full")


def test_an_empty_model_filled_afterwards_gives_the_same_bits(image_model):
    stored = image_model.state_dict()
    distill = ImageDistillModel(empty_model(copy.deepcopy(image_model.config), torch.float32), PLAN, KEPT)
    assert all(parameter.is_meta for parameter in distill.parameters())
    origins = distill.origins()
    assert set(origins.values()) == set(stored)
    fill(distill, lambda name: stored[origins[name]].clone())
    expected = ImageDistillModel(image_model, PLAN, KEPT)(pixel_values=images())["loss"]
    assert torch.equal(distill(pixel_values=images())["loss"], expected)


def test_tuning_learns_the_mean_cross_entropy_with_the_adapter_and_the_head(image_model):
    expected = F.cross_entropy(_logits(image_model), LABELS)
    right = (_logits(image_model).argmax(-1) == LABELS).float().mean()
    tuned = prepare_tuning(image_model, PLAN, "full")
    output = ImageModel(tuned)(pixel_values=images(), labels=LABELS)
    torch.testing.assert_close(output["loss"].detach(), expected, rtol=1e-5, atol=1e-6)
    assert output["accuracy"].item() == pytest.approx(right.item())
    output["loss"].backward()
    learning = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    adapter = {f"{name}" for name, _ in tuned.named_parameters() if any(f"layers.{i}." in name for i in (0, 1, 5))}
    assert learning == adapter | {"classifier.weight", "classifier.bias"}


def test_what_was_distilled_goes_into_the_emulated_model(image_model):
    distill = ImageDistillModel(image_model, PLAN, KEPT)
    optimizer = torch.optim.SGD([p for p in distill.parameters() if p.requires_grad], lr=0.1)
    before = distill(pixel_values=images())["loss"]
    before.backward()
    optimizer.step()
    emulated = emulate(image_model, PLAN, KEPT)
    load_emulator(emulated, PLAN, distill.emulator_state())
    after = _plain_loss(image_model, emulated)
    torch.testing.assert_close(distill(pixel_values=images())["loss"], after, rtol=1e-5, atol=0)
    assert after < before


def test_losses_are_float32_in_a_model_of_bfloat16(image_model):
    image_model.to(torch.bfloat16)
    tuning = ImageModel(image_model)(pixel_values=images(), labels=LABELS)
    distilling = ImageDistillModel(image_model, PLAN, KEPT)(pixel_values=images())
    assert {tensor.dtype for tensor in (*tuning.values(), *distilling.values())} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in (*tuning.values(), *distilling.values()))
