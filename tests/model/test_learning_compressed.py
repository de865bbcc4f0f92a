"""Emulators that learn while they are compressed: what they compute is what is packed in the end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ot_ray.model import (
    DistillLoss,
    DistillModel,
    DistillOptions,
    EmulatorConfig,
    ImageDistillModel,
    SplitPlan,
    compress,
    emulate,
    load_emulator,
)
from ot_ray.model.families import layers_of, linear_names
from ot_ray.model.packed import LearningLinear, PackedFormat, PackedLinear, prune
from ot_ray.model.packed.rounding import rounded
from ot_ray.model.skeleton import empty_model, fill
from tests.fixtures.models import images, tiny_model, tokens

PLAN = SplitPlan(bottom=2, keep=2, top=1)
KEPT = [0, 2]
WAYS = {
    "quantized": EmulatorConfig(bits=3, group_size=16),
    "pruned": EmulatorConfig(sparsity=0.5),
    "both": EmulatorConfig(sparsity=0.4, bits=4, group_size=24),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request: pytest.FixtureRequest) -> EmulatorConfig:
    return request.param


def _linear(kind: str) -> nn.Linear | Conv1D:
    torch.manual_seed(4)
    linear = nn.Linear(40, 12) if kind == "linear" else Conv1D(12, 40)
    nn.init.normal_(linear.weight)
    nn.init.normal_(linear.bias)
    return linear


def _compressed(weight: torch.Tensor, kind: str, way: EmulatorConfig) -> torch.Tensor:
    """C(W) [out, in] from its parts."""
    found = prune(weight, way.sparsity)
    found = found.t().contiguous() if kind == "conv1d" else found
    return rounded(found, way.bits, way.group_size) if way.bits else found


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_computes_what_the_packed_map_computes_and_learns_straight_through(kind, way):
    linear = _linear(kind)
    original = linear.weight.detach().clone()
    learning = LearningLinear(copy.deepcopy(linear), way)
    format = PackedFormat(first_layer=0, layers=1, sparsity=way.sparsity, bits=way.bits, group_size=way.group_size)
    turned = original.t().contiguous() if kind == "conv1d" else original
    x, x_plain = (torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    y = learning(x)
    assert torch.equal(y, PackedLinear.of(turned, linear.bias, format)(x))

    dense = _compressed(original, kind, way).requires_grad_()
    bias = linear.bias.detach().clone().requires_grad_()
    grad = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    y.backward(grad)
    F.linear(x_plain, dense, bias).backward(grad)
    expected = dense.grad.t() if kind == "conv1d" else dense.grad
    # Pruned weights have none.
    expected = expected * (prune(original, way.sparsity) != 0)
    torch.testing.assert_close(learning.weight.grad, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(learning.bias.grad, bias.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-5, atol=1e-6)


def _batch() -> dict[str, torch.Tensor]:
    ids = tokens(2, 14)
    labels = ids.clone()
    labels[0, :9] = -100
    return {"input_ids": ids, "labels": labels}


def _nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def _learnt(family_model, way: EmulatorConfig, **options) -> DistillModel:
    """Three steps with weight decay."""
    distill = DistillModel(copy.deepcopy(family_model), PLAN, KEPT, DistillLoss(), DistillOptions(**options), way)
    learning = [parameter for parameter in distill.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=3e-3, weight_decay=0.1)
    for _ in range(3):
        distill(**_batch())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return distill.eval()


def test_what_is_packed_is_what_the_last_pass_saw(family_model, way):
    distill = _learnt(family_model, way)
    state = distill.emulator_state()
    model = emulate(family_model, PLAN, KEPT)
    load_emulator(model, PLAN, state)
    model = compress(model, PLAN, way)
    batch = _batch()
    seen: list[torch.Tensor] = []
    handle = layers_of(distill.model)[-2].register_forward_hook(lambda m, a, out: seen.append(out))
    measured = distill(**batch, setting="emulated")["nll"]
    handle.remove()
    hidden: list[torch.Tensor] = []
    handle = layers_of(model)[3].register_forward_hook(lambda m, a, out: hidden.append(out))
    torch.testing.assert_close(measured, _nll(model, batch), rtol=1e-5, atol=0)
    handle.remove()
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    assert torch.equal(first(seen[-1]), first(hidden[-1]))


def test_an_image_emulator_is_measured_as_it_is_packed(image_model, way):
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    distill = ImageDistillModel(copy.deepcopy(image_model), PLAN, KEPT, emulator=way)
    distill(**batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in distill.parameters() if parameter.requires_grad)
    logits = compress(emulate(image_model, PLAN, KEPT), PLAN, way)(pixel_values=batch["pixel_values"]).logits
    measured = distill.eval()(**batch, setting="emulated")["nll"]
    torch.testing.assert_close(measured, F.cross_entropy(logits, batch["labels"], reduction="sum"), rtol=1e-5, atol=0)


def test_pruned_weights_stay_away_and_the_others_move(family_model):
    way = WAYS["pruned"]
    state = _learnt(family_model, way).emulator_state()
    start = emulate(family_model, PLAN, KEPT)
    for place, layer in enumerate(list(layers_of(start))[2:4]):
        for name in linear_names(layer):
            before = layer.get_submodule(name).weight
            after = state[f"{place}.{name}.weight"]
            kept = prune(before, 0.5) != 0
            assert int(kept.sum()) == before.numel() - before.numel() // 2
            assert (after[~kept] == 0).all() and (after[kept] != before[kept]).float().mean() > 0.99


def test_activation_checkpointing_gives_the_same(way):
    model = tiny_model("llama")
    plain, checkpointed = (_learnt(model, way, checkpointing=on).emulator_state() for on in (False, True))
    assert all(torch.equal(tensor, checkpointed[name]) for name, tensor in plain.items())


def test_a_model_that_is_filled_later_starts_the_same(way):
    full = tiny_model("gpt2")
    here = DistillModel(copy.deepcopy(full), PLAN, KEPT, DistillLoss(), emulator=way)
    empty = DistillModel(empty_model(full.config, torch.float32), PLAN, KEPT, DistillLoss(), emulator=way)
    origins, stored = empty.origins(), full.state_dict()
    assert bool(empty.pruned) == bool(way.sparsity) and empty.pruned <= origins.keys()
    fill(empty, lambda name: empty.start_of(name, stored[origins[name]]))
    ours, theirs = here.state_dict(), empty.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    output, other = here(**_batch()), empty(**_batch())
    assert all(torch.equal(value, other[name]) for name, value in output.items())


def test_autocast_computes_in_bfloat16_and_learns_in_float32(way):
    learning = LearningLinear(_linear("linear"), way)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = learning(x)
    assert y.dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert learning.weight.grad.dtype == torch.float32 and learning.weight.grad.abs().sum() > 0
