"""Where each architecture keeps its layers: one table, one line a family.

Adding a family is a line here; tests/model runs every parity test over the table. Splitting itself is
in split.py."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from ot_ray.errors import UnsupportedModelError
from ot_ray.model import eva_clip  # noqa: F401 - a class that Transformers lacks

Task = Literal["text", "image"]


@dataclass(frozen=True)
class Family:
    """The places of one architecture, as dotted paths from the causal language model or image classifier."""

    layers: str
    """The `ModuleList` of transformer layers."""
    norm: str
    """The final norm after the last layer."""
    attention_out: str
    """Inside a layer, the last linear map of the attention, whose output is added to the residual stream."""
    mlp_out: str
    """Inside a layer, the last linear map of the MLP."""
    transposed: bool = False
    """Whether linear maps are stored [in, out] (GPT-2's `Conv1D`) rather than [out, in]."""
    positions_isolate: bool = True
    """Whether the architecture derives a block-diagonal mask from `position_ids` that restart at 0."""
    logits_cap: str | None = None
    """The config field of a bound that logits are squashed to, ``cap * tanh(logits / cap)``."""
    returns_tuple: bool = False
    """Whether a layer returns a tuple that starts with the hidden states, rather than the hidden states."""
    task: Task = "text"
    """What it is trained on: next tokens, or classes of images."""
    head: str | None = None
    """The linear map to the classes, which is part of the adapter; None in a language model."""
    tower: str | None = None
    """The field of the configuration that describes the layers, where that is a part of it."""
    renamed: tuple[tuple[str, str], ...] = ()
    """How checkpoints spell parts of tensor names that Transformers changes as it loads: (ours, theirs)."""


FAMILIES: dict[str, Family] = {
    "bloom": Family(
        "transformer.h",
        "transformer.ln_f",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        positions_isolate=False,
        returns_tuple=True,
    ),
    "gemma2": Family(
        "model.layers", "model.norm", "self_attn.o_proj", "mlp.down_proj", logits_cap="final_logit_softcapping"
    ),
    "gpt2": Family("transformer.h", "transformer.ln_f", "attn.c_proj", "mlp.c_proj", transposed=True),
    "llama": Family("model.layers", "model.norm", "self_attn.o_proj", "mlp.down_proj"),
    "mistral": Family("model.layers", "model.norm", "self_attn.o_proj", "mlp.down_proj"),
    "opt": Family(
        "model.decoder.layers", "model.decoder.final_layer_norm", "self_attn.out_proj", "fc2", positions_isolate=False
    ),
    "qwen2": Family("model.layers", "model.norm", "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": Family("model.layers", "model.norm", "self_attn.o_proj", "mlp.down_proj"),
    "blip_2_vision_model": Family(
        "vision_model.encoder.layers",
        "vision_model.post_layernorm",
        "self_attn.projection",
        "mlp.fc2",
        task="image",
        head="classifier",
    ),
    "clip": Family(
        "vision_model.encoder.layers",
        "vision_model.post_layernorm",
        "self_attn.out_proj",
        "mlp.fc2",
        task="image",
        head="classifier",
        tower="vision_config",
    ),
    "vit": Family(
        "vit.layers",
        "vit.layernorm",
        "attention.o_proj",
        "mlp.fc2",
        task="image",
        head="classifier",
        renamed=(
            (".layers.", ".encoder.layer."),
            (".attention.q_proj.", ".attention.attention.query."),
            (".attention.k_proj.", ".attention.attention.key."),
            (".attention.v_proj.", ".attention.attention.value."),
            (".attention.o_proj.", ".attention.output.dense."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ),
    ),
}
TEXT_FAMILIES = {name: family for name, family in FAMILIES.items() if family.task == "text"}
IMAGE_FAMILIES = {name: family for name, family in FAMILIES.items() if family.task == "image"}


def family_of(model: PreTrainedModel) -> Family:
    """Look up the family of a model.

    Raises:
        UnsupportedModelError: the architecture is not in the table, or uses a variant whose layers
            depend on their own depth.
    """
    model_type = str(getattr(model.config, "model_type", ""))
    check_supported(model_type)
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModelError(
            "config.scale_attn_by_inverse_layer_idx is True: each layer's scale depends on its depth, so a "
            "layer cannot move; use a model without it"
        )
    return FAMILIES[model_type]


def check_supported(model_type: str) -> None:
    """Refuse a `model_type` that is not in the table.

    Raises:
        UnsupportedModelError: names the supported ones, and the nearest if there is one.
    """
    if model_type in FAMILIES:
        return
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnsupportedModelError(
        f"model_type is {model_type!r}, which is not supported; use one of: {', '.join(FAMILIES)}{hint}"
    )


def check_maps_are_called(config: Any) -> None:
    """Refuse a model that multiplies by a linear map's weight without calling the map, where something is put into
    the map's place or behind it.

    Raises:
        UnsupportedModelError: names the setting of the model.
    """
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise UnsupportedModelError(
            f"config.slow_but_exact is True and config.pretraining_tp is {config.pretraining_tp}: the model passes by "
            "its own linear maps, so that lora, bottleneck and an emulator's smaller or packed maps would be left out; "
            "set slow_but_exact to false, or use method full or bitfit, and no emulator.sparsity, bits, attention_rank "
            "or mlp_channels"
        )


def auto_class(model_type: str) -> Any:
    """Which of Transformers' automatic classes makes and opens models of a supported `model_type`."""
    return AutoModelForCausalLM if FAMILIES[model_type].task == "text" else AutoModelForImageClassification


def layer_config(config: Any) -> Any:
    """The configuration that describes the layers, `num_hidden_layers` among it: the whole, or a part of it."""
    tower = FAMILIES[config.model_type].tower
    return getattr(config, tower) if tower else config


def head_of(model: PreTrainedModel) -> nn.Linear | None:
    """The linear map to the classes, weight [C, D] and bias [C]; None in a language model."""
    path = family_of(model).head
    return model.get_submodule(path) if path else None  # type: ignore[return-value]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's own list of transformer layers."""
    return model.get_submodule(family_of(model).layers)  # type: ignore[return-value]


def set_layers(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Put another list in the place of the model's layer list."""
    parent, _, name = family_of(model).layers.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)


def linear_names(layer: nn.Module) -> list[str]:
    """Names, inside one layer, of its linear maps (`nn.Linear` and GPT-2's `Conv1D`), sorted."""
    from transformers.pytorch_utils import Conv1D

    return sorted(name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D))


def per_layer_lists(config: object) -> Iterator[str]:
    """Names of fields of a `layer_config` that hold one entry a layer, such as `layer_types`."""
    depth = config.num_hidden_layers  # type: ignore[attr-defined]
    for name, value in vars(config).items():
        if name == "layer_types" and isinstance(value, list | tuple) and len(value) == depth:
            yield name


def renumber(layers: nn.ModuleList) -> None:
    """Give each layer, and every module in it that keeps one, the index of its place in the list.

    The key-value cache is addressed by it.
    """
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]


def first_of(output: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states in what a layer returns: some families return a tuple, some the tensor."""
    return output[0] if isinstance(output, tuple) else output
