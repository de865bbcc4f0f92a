"""Bottlenecks against the formula written out by hand, for every family."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import PreTrainedModel

from ot_ray.errors import SplitError, UnsupportedModelError
from ot_ray.model import (
    BottleneckSettings,
    SplitPlan,
    adapter_state,
    emulate,
    merged_adapter_state,
    plug_in,
    prepare_tuning,
)
from ot_ray.model.families import layers_of
from tests.fixtures.models import tiny_model, tokens

PLAN = SplitPlan(bottom=1, keep=2, top=2)
SIZE = 5
# Written out here, so that a wrong place in the families' table is seen.
PLACES = {
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
}
FULL, EMULATED = [0, 4, 5], [0, 3, 4]  # the adapter layers of PLAN in a model of 6 layers, and in its emulated model


def _tuned(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """A model of any depth with bottlenecks in its adapter layers, of which no tensor is 0."""
    tuned = prepare_tuning(model, PLAN, "bottleneck", bottleneck=BottleneckSettings(size=SIZE))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return tuned  # type: ignore[return-value]


def _emulated(model: PreTrainedModel) -> PreTrainedModel:
    return emulate(model, PLAN, [0, 2])


@contextmanager
def _by_hand(model: PreTrainedModel, state: dict[str, torch.Tensor], positions: list[int]) -> Iterator[None]:
    """Changes what the linear maps of a plain model give, by the formula y + up(gelu(down(y)))."""
    handles = []
    for bundle, position in zip(EMULATED, positions, strict=True):
        for place in PLACES[model.config.model_type]:
            named = f"layers.{bundle}.{place}.bottleneck"
            w1, b1, w2, b2 = (state[f"{named}.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias"))

            def change(module, inputs, y, w1=w1, b1=b1, w2=w2, b2=b2):  # type: ignore[no-untyped-def]
                z = torch.einsum("...d,sd->...s", y, w1) + b1
                return y + torch.einsum("...s,ds->...d", z * 0.5 * (1 + torch.erf(z / math.sqrt(2))), w2) + b2

            handles.append(layers_of(model)[position].get_submodule(place).register_forward_hook(change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_the_untuned_start_is_the_base_bit_for_bit(family_model: PreTrainedModel) -> None:
    emulated = _emulated(family_model)
    with torch.no_grad():
        before = emulated(tokens()).logits
        tuned = prepare_tuning(emulated, PLAN, "bottleneck")
        assert torch.equal(tuned(tokens()).logits, before)
    down = [p for name, p in tuned.named_parameters() if name.endswith("bottleneck.down.weight")]
    # Drawn, each for itself: what starts at 0 on both sides would never learn.
    assert len(down) == 6 and all(p.shape == (64, 32) and bool(p.any()) for p in down)
    assert not torch.equal(down[0], down[1])


def test_logits_and_gradients_are_the_formula_s(family_model: PreTrainedModel) -> None:
    tuned = _tuned(_emulated(family_model))
    state = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in adapter_state(tuned, PLAN).items()
        if ".bottleneck." in name
    }
    assert len(state) == 3 * 2 * 4
    ours = tuned(input_ids=tokens(), labels=tokens())
    ours.loss.backward()
    plain = _emulated(family_model).requires_grad_(False)
    with _by_hand(plain, state, EMULATED):
        reference = plain(input_ids=tokens(), labels=tokens())
        reference.loss.backward()
    torch.testing.assert_close(ours.logits, reference.logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(reference.logits, plain(tokens()).logits, atol=1e-2)
    learning = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(learning) == len(state)
    for position in EMULATED:
        for name, parameter in layers_of(tuned)[position].named_parameters():
            if ".bottleneck." in name:
                wanted = state[f"layers.{position}.{name}"].grad
                assert wanted is not None and bool(wanted.any())
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert all(p.grad is None for name, p in tuned.named_parameters() if name not in learning)


def test_plugged_into_the_full_model_they_are_the_formula_there(family_model: PreTrainedModel) -> None:
    state = merged_adapter_state(_tuned(_emulated(family_model)), PLAN)
    with torch.no_grad():
        before = family_model(tokens()).logits
        plugged = plug_in(family_model, PLAN, state)
        with _by_hand(family_model, state, FULL):
            reference = family_model(tokens()).logits
        torch.testing.assert_close(plugged(tokens()).logits, reference, rtol=1e-5, atol=1e-5)
        # The full model that was tuned itself, its bottlenecks the same.
        itself = _tuned(emulate(family_model, SplitPlan(bottom=1, keep=3, top=2), [0, 1, 2]))
        assert torch.equal(plugged(tokens()).logits, itself(tokens()).logits)
        assert torch.equal(family_model(tokens()).logits, before), "the full model is left as it was"
    assert not any("bottleneck" in name for name in family_model.state_dict())
    assert {
        name: bool(torch.equal(tensor, state[name])) for name, tensor in adapter_state(plugged, PLAN).items()
    } == dict.fromkeys(state, True)


def test_generation_with_the_cache_equals_generation_without(family_model: PreTrainedModel) -> None:
    plugged = plug_in(family_model, PLAN, merged_adapter_state(_tuned(_emulated(family_model)), PLAN))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        plugged.generate(tokens(), use_cache=True, **settings),  # type: ignore[operator]
        plugged.generate(tokens(), use_cache=False, **settings),  # type: ignore[operator]
    )


def test_plugging_in_draws_no_random_numbers() -> None:
    model = tiny_model("llama")
    state = merged_adapter_state(_tuned(_emulated(model)), PLAN)
    before = torch.get_rng_state()
    plug_in(model, PLAN, state)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plugged_model_takes_another_adapter_of_the_same_size() -> None:
    model = tiny_model("opt")
    first, second = (merged_adapter_state(_tuned(_emulated(model), seed), PLAN) for seed in (1, 2))
    again = plug_in(plug_in(model, PLAN, first), PLAN, second)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, plug_in(model, PLAN, second)(tokens()).logits)


def test_a_second_bottleneck_is_refused() -> None:
    tuned = _tuned(_emulated(tiny_model("opt")))
    with pytest.raises(SplitError, match=r"self_attn\.out_proj of an adapter layer has a bottleneck already"):
        prepare_tuning(tuned, PLAN, "bottleneck")
    assert len(layers_of(tuned)[0].fc2._forward_hooks) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_of_the_type_of_their_linear_map(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2").to(dtype)
    tuned = _tuned(_emulated(model))
    assert {p.dtype for p in tuned.parameters()} == {dtype}
    plugged = plug_in(model, PLAN, {name: t.float() for name, t in merged_adapter_state(tuned, PLAN).items()})
    assert {p.dtype for p in plugged.parameters()} == {dtype}
    # Learning in float32 behind a frozen half-precision map, as the engine has it, leaves the output's type.
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert tuned(tokens()).logits.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, n: s.pop(f"{n}.up.bias"), r"fc2\.bottleneck\.up\.bias is missing"),
        (lambda s, n: s.pop(f"{n}.down.weight"), r"fc2\.bottleneck\.up\.weight is not part"),
        (lambda s, n: s.update({f"{n}.x": torch.ones(1)}), r"fc2\.bottleneck\.x is not part"),
        (lambda s, n: s.update({f"{n}.up.weight": torch.ones(32, 6)}), r"has shape \(32, 6\), not \(32, 5\)"),
        (lambda s, n: s.update({f"{n}.down.weight": torch.ones(5)}), r"is not part"),
        (lambda s, n: s.update({"layers.0.fc1.bottleneck.down.weight": torch.ones(2, 48)}), r"fc1.* is not part"),
        (lambda s, n: s.update({"layers.1.fc2.bottleneck.down.weight": torch.ones(2, 32)}), r"layers\.1.* is not part"),
    ],
)
def test_states_that_are_no_whole_bottleneck_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("opt")
    state = merged_adapter_state(_tuned(_emulated(model)), PLAN)
    change(state, "layers.3.fc2.bottleneck")
    with pytest.raises(SplitError, match=message):
        plug_in(model, PLAN, state)
    assert not any("bottleneck" in name for name in model.state_dict())


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_a_model_that_passes_by_its_linear_maps_is_refused(method) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("bloom")
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    with pytest.raises(UnsupportedModelError, match="slow_but_exact to false"):
        prepare_tuning(model, PLAN, method)
    prepare_tuning(model, PLAN, "full")
