"""Rows with adapters of their own against each adapter's plug-in model alone, in every family of language models."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from ot_ray.errors import UnsupportedModelError
from ot_ray.model import (
    METHODS,
    BottleneckSettings,
    LoraSettings,
    SplitPlan,
    adapter_state,
    emulate,
    merged_adapter_state,
    plug_in,
    prepare_tuning,
)
from ot_ray.model.families import layers_of
from ot_ray.model.multi_adapter import BASE, MultiAdapter
from tests.fixtures.models import tiny_image_model, tiny_model, tokens

PLANS = {
    "full": SplitPlan(bottom=1, keep=2, top=1),
    "lora": SplitPlan(bottom=2, keep=2, top=1),
    "bottleneck": SplitPlan(bottom=1, keep=2, top=2),
    "bitfit": SplitPlan(bottom=0, keep=2, top=2),
}
# Matrix products of other numbers of rows are summed in another order; everything else is the same arithmetic.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


def plugged(model: PreTrainedModel, method: str, seed: int = 0) -> PreTrainedModel:
    """The plug-in model of an adapter with noise on whatever the method tunes."""
    plan, generator = PLANS[method], torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = prepare_tuning(
            emulate(model, plan, [0, 1]), plan, method, LoraSettings(rank=2), BottleneckSettings(size=4)
        )
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return plug_in(model, plan, merged_adapter_state(tuned, plan)).eval()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def test_every_row_is_what_its_own_plug_in_model_says(family_model: PreTrainedModel) -> None:
    many = MultiAdapter(family_model)
    alone = {BASE: family_model}
    for method in METHODS:
        model = plugged(family_model, method)
        alone[many.attach(model, PLANS[method])] = model
    # Every adapter twice, in no order, beside the base.
    rows = [3, BASE, 1, 4, 2, 4, BASE, 1, 2, 3]
    ids = tokens(batch=len(rows))
    with torch.inference_mode():
        together = many(rows, input_ids=ids).logits
        swapped = many(rows[::-1], input_ids=ids.flip(0)).logits.flip(0)
    for row, adapter in enumerate(rows):
        own = logits(alone[adapter], ids[row : row + 1])[0]
        torch.testing.assert_close(together[row], own, **ROUNDING)
        # The adapters differ by far more than that.
        for other, model in alone.items():
            if other != adapter:
                assert (logits(model, ids[row : row + 1])[0] - own).abs().max() > 0.01
    torch.testing.assert_close(together, swapped, **ROUNDING)


def test_rows_of_one_adapter_are_its_plug_in_model_to_the_last_bit(family_model: PreTrainedModel) -> None:
    many, ids, before = MultiAdapter(family_model), tokens(), logits(family_model, tokens())
    model = plugged(family_model, "bottleneck")
    adapter = many.attach(model, PLANS["bottleneck"])
    with torch.inference_mode():
        assert torch.equal(many([adapter, adapter], input_ids=ids).logits, logits(model, ids))
        assert torch.equal(many([BASE, BASE], input_ids=ids).logits, before)
        many.detach(adapter)
        assert torch.equal(many([BASE, BASE], input_ids=ids).logits, before)
    assert torch.equal(logits(family_model, ids), before)


def test_an_adapter_that_is_not_finite_reaches_no_other_row(family_model: PreTrainedModel) -> None:
    sound, broken = plugged(family_model, "full"), plugged(family_model, "full", seed=1)
    state = {name: tensor.clone() for name, tensor in adapter_state(broken, PLANS["full"]).items()}
    for tensor in state.values():
        tensor.fill_(float("nan"))
    worse = plug_in(family_model, PLANS["full"], state)
    found = []
    for neighbour in (broken, worse):
        many = MultiAdapter(family_model)
        first, second = many.attach(sound, PLANS["full"]), many.attach(neighbour, PLANS["full"])
        with torch.inference_mode():
            found.append(many([second, first, BASE, second, first], input_ids=tokens(batch=5)).logits)
    assert not found[1][[0, 3]].isfinite().any()
    assert torch.equal(found[1][[1, 2, 4]], found[0][[1, 2, 4]])


def test_gradients_go_to_the_adapter_of_their_row() -> None:
    base = tiny_model("llama").requires_grad_(False)
    models = [plugged(base, method).requires_grad_(False) for method in ("bottleneck", "full")]
    many, ids = MultiAdapter(base), tokens(batch=3)
    rows = [many.attach(model, PLANS[method]) for model, method in zip(models, ("bottleneck", "full"), strict=True)]
    trained = [layer.get_parameter("mlp.down_proj.weight") for layer in (model.model.layers[-1] for model in models)]
    for weight in trained:
        weight.requires_grad_(True)
    many([rows[1], rows[0], BASE], input_ids=ids).logits[1:].square().sum().backward()
    assert trained[1].grad is None or not trained[1].grad.any()
    assert trained[0].grad is not None
    got = trained[0].grad.clone()
    trained[0].grad = None
    models[0](input_ids=ids[1:2]).logits.square().sum().backward()
    assert trained[0].grad is not None
    torch.testing.assert_close(got, trained[0].grad, rtol=1e-4, atol=1e-3)


def test_what_cannot_have_rows_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="takes images"):
        MultiAdapter(tiny_image_model("vit"))
    many = MultiAdapter(tiny_model("opt"))
    with pytest.raises(KeyError, match="7"):
        many([7], input_ids=tokens(batch=1))


def test_a_model_of_another_shape_leaves_nothing_behind() -> None:
    model = tiny_model("opt")
    many, other = MultiAdapter(model), plugged(model, "full")
    del layers_of(other)[-1].fc2
    with pytest.raises(AttributeError):
        many.attach(other, PLANS["full"])
    assert not any(grouped.adapters for found in many._grouped.values() for grouped in found.values())
