"""Counts of parameters and operations, against published and measured ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedModel

from ot_ray.model import DistillLoss, DistillModel, SplitPlan
from ot_ray.training.planning import parts_of
from ot_ray.training.planning.activations import packed_rows
from ot_ray.training.utilisation import peak_flops, step_flops
from tests.fixtures.models import tiny_model

# The shapes of the published config.json files, and the sizes that their weights have.
_OPT = {"vocab_size": 50272, "max_position_embeddings": 2048, "num_attention_heads": 32}
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "opt-6.7b": (
        "opt",
        {**_OPT, "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "word_embed_proj_dim": 4096},
        6_658_473_984,
    ),
    "opt-1.3b": (
        "opt",
        {**_OPT, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "word_embed_proj_dim": 2048},
        1_315_758_080,
    ),
    "bloom-7b1": ("bloom", {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}, 7_069_016_064),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "llama-2-7b": ("llama", {"max_position_embeddings": 4096}, 6_738_415_616),
}
PLAN = SplitPlan(bottom=2, keep=2, top=1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_add_up_to_the_published_size(name: str) -> None:
    model_type, values, published = PUBLISHED[name]
    parts = parts_of(AutoConfig.for_model(model_type, **values), SplitPlan(bottom=2, keep=8, top=2))
    assert parts.full == published
    assert parts.emulator == 8 * parts.bottom // 2


def test_parts_are_those_of_the_model_that_is_trained(family_model: PreTrainedModel) -> None:
    parts = parts_of(family_model.config, PLAN)
    distilled = DistillModel(family_model, PLAN, [0, 2], DistillLoss())
    counts = {name: parameter.numel() for name, parameter in distilled.named_parameters() if parameter.requires_grad}
    assert parts.emulator == sum(counts.values())
    assert parts.full + parts.emulator == sum(parameter.numel() for parameter in distilled.parameters())


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_flops_are_those_that_a_pass_makes(model_type: str) -> None:
    model = _wide(model_type)
    shape, batch = model.config, packed_rows(2, 16)
    distilled = DistillModel(model, PLAN, [0, 2], DistillLoss())
    with FlopCounterMode(display=False) as counter:
        distilled(**batch)["loss"].backward()
    # The first maps of E need no gradient by their inputs, and the last position predicts nothing.
    assert step_flops(shape, PLAN, 2, 16) == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_a_window_bounds_the_flops_of_attention() -> None:
    shape = _wide("mistral").config
    shape.sliding_window = None
    whole = step_flops(shape, PLAN, 1, 64)
    shape.sliding_window = 64
    assert step_flops(shape, PLAN, 1, 64) == whole
    shape.sliding_window = 1
    # 7 layers forward, 2 + 1 twice backward; a token then sees 1 position instead of 32.5.
    saved = 64 * 4 * 128 * (32.5 - 1) * (8 + 2 * 3)
    assert whole - step_flops(shape, PLAN, 1, 64) == pytest.approx(saved)


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("Voodoo 2", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def _wide(model_type: str) -> PreTrainedModel:
    """Wide enough that attention is a small part; six layers."""
    values = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 96}
    if model_type == "opt":
        values |= {"ffn_dim": 512, "word_embed_proj_dim": 128}
    else:
        values |= {"intermediate_size": 256, "num_key_value_heads": 4}
    torch.manual_seed(0)
    return type(tiny_model(model_type))(AutoConfig.for_model(model_type, **values, pad_token_id=0))
