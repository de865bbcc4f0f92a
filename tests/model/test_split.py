"""Splitting and plugging back, for every family, against the plain Transformers model."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from ot_ray.errors import SplitError, UnsupportedModelError
from ot_ray.model import SplitPlan, adapter_state, depth_of, emulate, family_of, plug_in, uniform_layers
from ot_ray.model.families import FAMILIES, TEXT_FAMILIES, check_supported, layers_of
from tests.fixtures.models import tiny_model, tokens

PLANS = [
    SplitPlan(bottom=2, keep=1, top=2),
    SplitPlan(bottom=0, keep=3, top=1),
    SplitPlan(bottom=1, keep=2, top=0),
]


def _logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_untouched_adapter_gives_the_original_logits_bit_for_bit(family_model, plan):
    before = _logits(family_model)
    kept = uniform_layers(len(plan.middle(6)), plan.keep)
    state = adapter_state(emulate(family_model, plan, kept), plan)
    assert torch.equal(_logits(plug_in(family_model, plan, state)), before)
    assert torch.equal(_logits(family_model), before)


@pytest.mark.parametrize("plan", [SplitPlan(bottom=2, keep=2, top=2), SplitPlan(bottom=1, keep=5, top=0)], ids=str)
def test_keeping_all_of_the_middle_is_the_full_model(family_model, plan):
    emulated = emulate(family_model, plan, range(plan.keep))
    with torch.no_grad():
        full = family_model(tokens(), output_hidden_states=True).hidden_states
        ours = emulated(tokens(), output_hidden_states=True).hidden_states
    assert len(ours) == len(full)
    assert all(torch.equal(a, b) for a, b in zip(ours, full, strict=True))


def test_emulated_model_is_what_transformers_builds_from_its_config(family_model, tmp_path):
    plan = SplitPlan(bottom=1, keep=2, top=1)
    emulated = emulate(family_model, plan, [0, 3])
    emulated.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert depth_of(reloaded) == 4
    assert torch.equal(_logits(reloaded), _logits(emulated))
    # An independent computation: a model built fresh from the source's chosen layers.
    config = AutoConfig.from_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(config).eval()
    fresh.load_state_dict(family_model.state_dict(), strict=False)
    for target, source in zip(layers_of(fresh), [0, 1, 4, 5], strict=True):
        target.load_state_dict(layers_of(family_model)[source].state_dict())
    assert torch.equal(_logits(emulated), _logits(fresh))


def test_generation_with_the_cache_equals_generation_without(family_model):
    plan = SplitPlan(bottom=2, keep=1, top=1)
    emulated = emulate(family_model, plan, [1])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        emulated.generate(tokens(), use_cache=True, **settings),
        emulated.generate(tokens(), use_cache=False, **settings),
    )


def test_changed_adapter_reaches_its_own_layers_only(family_model):
    plan = SplitPlan(bottom=1, keep=1, top=2)
    state = {name: tensor + 0.01 for name, tensor in adapter_state(family_model, plan).items()}
    plugged = plug_in(family_model, plan, state)
    for position, (ours, original) in enumerate(zip(layers_of(plugged), layers_of(family_model), strict=True)):
        changed = position in (0, 4, 5)
        for (name, a), b in zip(ours.state_dict().items(), original.state_dict().values(), strict=True):
            assert (a.data_ptr() != b.data_ptr()) == changed, name
    for name, tensor in adapter_state(plugged, plan).items():
        assert torch.equal(tensor, state[name])


def test_shared_copy_holds_the_same_tensors(family_model):
    clone = emulate(family_model, SplitPlan(bottom=2, keep=2, top=2), [0, 1], share=True)
    originals = {parameter.data_ptr() for parameter in family_model.parameters()}
    assert {parameter.data_ptr() for parameter in clone.parameters()} <= originals
    independent = emulate(family_model, SplitPlan(bottom=2, keep=2, top=2), [0, 1])
    assert not {parameter.data_ptr() for parameter in independent.parameters()} & originals


@pytest.mark.parametrize(
    ("middle", "keep", "expected"),
    [
        (44, 16, [0, 3, 6, 9, 11, 14, 17, 20, 23, 26, 29, 32, 34, 37, 40, 43]),  # GPT2-XL 2-16-2
        (20, 8, [0, 3, 5, 8, 11, 14, 16, 19]),  # OPT-1.3B 2-8-2
        (5, 1, [2]),
        (6, 2, [0, 5]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_uniform_layers(middle, keep, expected):
    assert uniform_layers(middle, keep) == expected


def test_uniform_layers_always_differ_and_keep_both_ends():
    for middle in range(1, 60):
        for keep in range(1, middle + 1):
            chosen = uniform_layers(middle, keep)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == keep
            assert keep == 1 or (chosen[0], chosen[-1]) == (0, middle - 1)


def test_plans_that_do_not_fit_say_what_would():
    with pytest.raises(SplitError, match=r"split.keep is 3, but only 2 layers lie between .* use 1\.\.2"):
        SplitPlan(bottom=2, keep=3, top=2).middle(6)
    with pytest.raises(SplitError, match=r"the model has 6 layers; use at most 5"):
        SplitPlan(bottom=3, keep=1, top=3).middle(6)
    with pytest.raises(ValidationError, match="nothing could be tuned"):
        SplitPlan(bottom=0, keep=1, top=0)
    with pytest.raises(SplitError, match=r"1\.\.5"):
        uniform_layers(5, 6)
    with pytest.raises(SplitError, match=r"kept is \[3, 0\]"):
        emulate(tiny_model("llama"), SplitPlan(bottom=1, keep=2, top=1), [3, 0])


def test_adapters_that_do_not_fit_are_refused_by_tensor_name():
    model, plan = tiny_model("llama"), SplitPlan(bottom=1, keep=1, top=1)
    state = dict(adapter_state(model, plan))
    name = "layers.2.mlp.up_proj.weight"
    with pytest.raises(SplitError, match=rf"tensor {name} is missing"):
        plug_in(model, plan, {k: v for k, v in state.items() if k != name})
    with pytest.raises(SplitError, match=r"tensor layers\.1\.x is not part"):
        plug_in(model, plan, {**state, "layers.1.x": torch.zeros(1)})
    with pytest.raises(SplitError, match=rf"tensor {name} has shape \(1, 1\), not \(48, 32\)"):
        plug_in(model, plan, {**state, name: torch.zeros(1, 1)})


def test_unsupported_architectures_are_named():
    with pytest.raises(UnsupportedModelError, match=r"'llama5'.*use one of: bloom, gemma2.*did you mean llama\?"):
        check_supported("llama5")
    config = AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx"):
        family_of(AutoModelForCausalLM.from_config(config))


def test_the_table_holds_the_promised_families():
    text = {"bloom", "gemma2", "gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"}
    assert set(FAMILIES) == text | {"blip_2_vision_model", "clip", "vit"}
    assert set(TEXT_FAMILIES) == text
