"""Tuning methods: what moves, what PEFT's own counts say, and merged equals unmerged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ot_ray.model import (
    LoraSettings,
    SplitPlan,
    adapter_state,
    emulate,
    merged_adapter_state,
    plug_in,
    prepare_tuning,
    trainable_parameters,
)
from ot_ray.model.families import layers_of
from tests.fixtures.models import tiny_model, tokens

PLAN = SplitPlan(bottom=1, keep=2, top=2)


def _emulated(model):
    return emulate(model, PLAN, [0, 2])


def _step(model, lr=0.05):
    learning = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        with torch.no_grad():
            for parameter in learning:
                parameter -= lr * parameter.grad
                parameter.grad = None


def test_full_tunes_the_adapter_layers_and_nothing_else(family_model):
    tuned = prepare_tuning(_emulated(family_model), PLAN, "full")
    layers = layers_of(tuned)
    expected = sum(p.numel() for i in (0, 3, 4) for p in layers[i].parameters())
    assert trainable_parameters(tuned) == expected


def test_lora_tunes_every_linear_map_of_the_adapter_layers(family_model):
    tuned = prepare_tuning(_emulated(family_model), PLAN, "lora", LoraSettings(rank=3))
    expected = 0
    for position in (0, 1, 2):
        for module in layers_of(family_model)[position].modules():
            if isinstance(module, nn.Linear):
                expected += 3 * (module.in_features + module.out_features)
            elif isinstance(module, Conv1D):
                expected += 3 * sum(module.weight.shape)
    assert trainable_parameters(tuned) == expected
    named = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in named)
    places = {int(part) for name in named for part in name.split(".") if part.isdigit()}
    assert places == {0, 3, 4}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_plug_in_of_a_tuned_adapter_equals_tuning_in_place(family_model, method):
    tuned = prepare_tuning(_emulated(family_model), PLAN, method)
    _step(tuned)
    before = tuned(tokens()).logits
    state = merged_adapter_state(tuned, PLAN)
    assert torch.equal(tuned(tokens()).logits, before), "reading the state leaves the model as it was"
    # Plugged into the emulated model itself, the tuned logits come back.
    again = plug_in(_emulated(family_model), PLAN, state)
    torch.testing.assert_close(again(tokens()).logits, before, rtol=1e-4, atol=1e-4)
    changed = [
        name for name, tensor in adapter_state(family_model, PLAN).items() if not torch.equal(tensor, state[name])
    ]
    assert {name.split(".")[1] for name in changed} == {"0", "3", "4"}
    plugged = plug_in(family_model, PLAN, state)
    assert not torch.allclose(plugged(tokens()).logits, family_model(tokens()).logits)


def test_unpeft_model_has_the_paper_count_for_opt_1_3b():
    """Table 5 of the paper: 201M for full and, at rank 4 over all linear maps, 590K for OPT-1.3B 2-8-2."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "opt",
        hidden_size=2048,
        ffn_dim=8192,
        num_attention_heads=32,
        num_hidden_layers=12,
        vocab_size=128,
        word_embed_proj_dim=2048,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        plan = SplitPlan(bottom=2, keep=8, top=2)
        assert trainable_parameters(prepare_tuning(model, plan, "full")) == pytest.approx(201e6, rel=0.005)
        assert trainable_parameters(prepare_tuning(model, plan, "lora")) == 589_824


def test_base_weights_do_not_drift_when_read_often():
    tuned = prepare_tuning(_emulated(tiny_model("llama")), PLAN, "lora")
    _step(tuned)
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    for _ in range(20):
        merged_adapter_state(tuned, PLAN)
    assert all(torch.equal(p, before[name]) for name, p in tuned.named_parameters())
