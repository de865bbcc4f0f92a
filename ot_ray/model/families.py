"""Where each architecture keeps its layers: one table, one line a family.

Adding a family is a line here; tests/model runs every parity test over the table. Splitting itself is
in split.py."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ot_ray.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """The places of one architecture, as dotted paths from the causal language model."""

    layers: str
    """The `ModuleList` of transformer layers."""
    norm: str
    """The final norm after the last layer."""
    transposed: bool = False
    """Whether linear maps are stored [in, out] (GPT-2's `Conv1D`) rather than [out, in]."""
    positions_isolate: bool = True
    """Whether the architecture derives a block-diagonal mask from `position_ids` that restart at 0."""
    logits_cap: str | None = None
    """The config field of a bound that logits are squashed to, ``cap * tanh(logits / cap)``."""
    returns_tuple: bool = False
    """Whether a layer returns a tuple that starts with the hidden states, rather than the hidden states."""


FAMILIES: dict[str, Family] = {
    "bloom": Family("transformer.h", "transformer.ln_f", positions_isolate=False, returns_tuple=True),
    "gemma2": Family("model.layers", "model.norm", logits_cap="final_logit_softcapping"),
    "gpt2": Family("transformer.h", "transformer.ln_f", transposed=True),
    "llama": Family("model.layers", "model.norm"),
    "mistral": Family("model.layers", "model.norm"),
    "opt": Family("model.decoder.layers", "model.decoder.final_layer_norm", positions_isolate=False),
    "qwen2": Family("model.layers", "model.norm"),
    "qwen3": Family("model.layers", "model.norm"),
}


def family_of(model: PreTrainedModel) -> Family:
    """Look up the family of a causal language model.

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
    """Names of config fields that hold one entry a layer, such as `layer_types`."""
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
