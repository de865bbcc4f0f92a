"""The traced weight of activations, against that of the same pass with real tensors."""

from __future__ import annotations

import pytest
import torch

from ot_ray.model import DistillLoss, DistillModel, DistillOptions, SplitPlan, uniform_layers
from ot_ray.training.planning.activations import Activations, activations_of, packed_rows
from ot_ray.training.planning.live_bytes import LiveBytes
from tests.fixtures.models import tiny_model

PLAN = SplitPlan(bottom=1, keep=3, top=1)


# Attention of its own, two kinds of layers, and masks that are handed to each layer.
@pytest.mark.parametrize("model_type", ["bloom", "gemma2", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_traced_pass_weighs_what_the_real_one_does(model_type: str, checkpointing: bool) -> None:
    shape = tiny_model(model_type).config
    traced = activations_of(shape, PLAN, 4, 64, torch.float32, checkpointing)
    assert traced == _real(model_type, checkpointing)


def test_checkpointing_saves_activations() -> None:
    shape = tiny_model("llama").config
    kept, again = (activations_of(shape, PLAN, 4, 64, torch.bfloat16, on) for on in (False, True))
    assert again.forward < kept.forward
    assert again.backward < kept.backward


def test_live_bytes_follow_storages_until_they_are_freed() -> None:
    weight, before = torch.zeros(10, 10, requires_grad=True), torch.zeros(10, 10)
    live = LiveBytes()
    live.leave_out(weight)
    live.adopt(before)
    assert live.now == 400
    with live:
        product = before @ weight
        assert live.now == 800
        view = product[:2]
        del product
        assert live.now == 800, "a view keeps its storage"
        del view
    assert (live.now, live.peak) == (400, 800)
    live.leave_out(before)
    assert live.now == 0
    del before
    assert live.now == 0


def _real(model_type: str, checkpointing: bool) -> Activations:
    kept = uniform_layers(4, 3)
    options = DistillOptions(checkpointing=checkpointing)
    module = DistillModel(tiny_model(model_type), PLAN, kept, DistillLoss(), options).train()
    batch = packed_rows(4, 64)
    alone, together = LiveBytes(), LiveBytes()
    for live in (alone, together):
        live.leave_out(*module.parameters(), *module.buffers(), *batch.values())
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda learnt: alone.leave_out(learnt.grad))  # type: ignore[arg-type]
    with alone, together:
        loss = module(**batch)["loss"]
        forward = alone.peak
        alone.restart()
        together.restart()
        loss.backward()
    return Activations(forward, alone.peak, together.peak)
