"""Tuning methods: what moves, what the paper and PEFT count, and merged equals unmerged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

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
    trainable_parameters,
)
from ot_ray.model.families import layers_of
from tests.fixtures.models import tiny_model, tokens

PLAN = SplitPlan(bottom=1, keep=2, top=2)
ADAPTER = (0, 3, 4)  # positions in the emulated model


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


def _learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_there_are_four_methods():
    assert METHODS == ("full", "lora", "bottleneck", "bitfit")


def test_full_tunes_the_adapter_layers_and_nothing_else(family_model):
    tuned = prepare_tuning(_emulated(family_model), PLAN, "full")
    layers = layers_of(tuned)
    expected = sum(p.numel() for i in ADAPTER for p in layers[i].parameters())
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
    named = _learning(tuned)
    assert all("lora_" in name for name in named)
    places = {int(part) for name in named for part in name.split(".") if part.isdigit()}
    assert places == set(ADAPTER)


def test_bottleneck_tunes_two_bottlenecks_a_layer_and_nothing_else(family_model):
    tuned = prepare_tuning(_emulated(family_model), PLAN, "bottleneck", bottleneck=BottleneckSettings(size=3))
    assert trainable_parameters(tuned) == len(ADAPTER) * 2 * (2 * 3 * 32 + 3 + 32)
    named = _learning(tuned)
    assert all(".bottleneck." in name for name in named)
    assert named.isdisjoint(dict(_emulated(family_model).named_parameters()))
    places = {int(part) for name in named for part in name.split(".") if part.isdigit()}
    assert places == set(ADAPTER)


def test_bitfit_tunes_exactly_the_vectors_of_the_adapter_layers(family_model):
    tuned = prepare_tuning(_emulated(family_model), PLAN, "bitfit")
    before = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    prefix = next(name for name, module in tuned.named_modules() if module is layers_of(tuned))
    wanted = {
        f"{prefix}.{i}.{name}"
        for i in ADAPTER
        for name, parameter in layers_of(tuned)[i].named_parameters()
        if parameter.dim() == 1
    }
    assert _learning(tuned) == wanted
    # Norms have weights in every family.
    assert len(wanted) >= 2 * len(ADAPTER)
    _step(tuned)
    moved = {name for name, parameter in tuned.named_parameters() if not torch.equal(parameter, before[name])}
    # The softmax does not see what all keys have in common.
    exempt = {name for name in wanted if name.endswith("k_proj.bias")}
    assert wanted - exempt <= moved <= wanted


@pytest.mark.parametrize("method", METHODS)
def test_plug_in_of_a_tuned_adapter_equals_tuning_in_place(family_model, method):
    tuned = prepare_tuning(_emulated(family_model), PLAN, method)
    _step(tuned)
    before = tuned(tokens()).logits
    state = merged_adapter_state(tuned, PLAN)
    assert torch.equal(tuned(tokens()).logits, before), "reading the state leaves the model as it was"
    # Plugged into the emulated model itself, the tuned logits come back.
    again = plug_in(_emulated(family_model), PLAN, state)
    torch.testing.assert_close(again(tokens()).logits, before, rtol=1e-4, atol=1e-4)
    original = adapter_state(family_model, PLAN)
    changed = [
        name for name, tensor in state.items() if name not in original or not torch.equal(tensor, original[name])
    ]
    assert {name.split(".")[1] for name in changed} == {"0", "3", "4"}
    plugged = plug_in(family_model, PLAN, state)
    assert not torch.allclose(plugged(tokens()).logits, family_model(tokens()).logits)


GPT2_XL = {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 20, "vocab_size": 128}
OPT_1_3B = {
    "model_type": "opt",
    "hidden_size": 2048,
    "ffn_dim": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 12,
    "vocab_size": 128,
    "word_embed_proj_dim": 2048,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("shape", "keep", "method", "exact", "paper"),
    [
        (GPT2_XL, 16, "full", 122_963_200, "123M"),
        (GPT2_XL, 16, "bottleneck", 1_651_712, "1.65M"),
        (GPT2_XL, 16, "lora", 409_600, "410K"),
        (GPT2_XL, 16, "bitfit", 83_200, "83K"),
        (OPT_1_3B, 8, "full", 201_433_088, "201M"),
        (OPT_1_3B, 8, "bottleneck", 2_114_048, "2.11M"),
        (OPT_1_3B, 8, "lora", 589_824, "590K"),
        (OPT_1_3B, 8, "bitfit", 106_496, "106K"),
    ],
)
def test_counts_are_table_5_s(shape, keep, method, exact, paper):
    """Table 5 of the Offsite-Tuning paper, on the real shapes of 2-16-2 and 2-8-2, without weights.

    Which count belongs to which method follows from arithmetic: 4 layers of 2 bottlenecks of 64 are 1.65M for GPT2-XL
    (D 1600), rank 4 on every linear map is 410K, biases and norms are 83K.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **TOKENS))
        count = trainable_parameters(prepare_tuning(model, SplitPlan(bottom=2, keep=keep, top=2), method))
    assert count == exact
    number, unit = float(paper[:-1]), {"K": 1e3, "M": 1e6}[paper[-1]]
    decimals = len(paper[:-1].partition(".")[2])
    assert round(count / unit, decimals) == number


def test_base_weights_do_not_drift_when_read_often():
    tuned = prepare_tuning(_emulated(tiny_model("llama")), PLAN, "lora")
    _step(tuned)
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    for _ in range(20):
        merged_adapter_state(tuned, PLAN)
    assert all(torch.equal(p, before[name]) for name, p in tuned.named_parameters())
