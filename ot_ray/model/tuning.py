"""Tuning methods: what inside the adapter layers of an emulated model is trainable.

Saving what was tuned is in artifacts; the loop that tunes is in training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.model.families import family_of, layers_of, linear_names
from ot_ray.model.split import SplitPlan, adapter_state, freeze_all_but_adapter

Method = Literal["full", "lora"]
METHODS: tuple[Method, ...] = ("full", "lora")


class LoraSettings(Config):
    """Low-rank adaptation of every linear map in the adapter layers (the paper's Table 5: rank 4, alpha 32)."""

    rank: int = Field(default=4, ge=1)
    """Rank r of each update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of each update while tuning."""


def prepare_tuning(
    model: PreTrainedModel, plan: SplitPlan, method: Method, lora: LoraSettings | None = None
) -> PreTrainedModel | PeftModel:
    """Leave gradients on for what `method` tunes in the adapter layers of an emulated (or full) model.

    Returns:
        `model` itself for `full`; a `PeftModel` around it for `lora`.
    """
    if method == "full":
        freeze_all_but_adapter(model, plan)
        return model
    model.requires_grad_(False)
    return get_peft_model(model, lora_config(model, plan, lora or LoraSettings()))


def lora_config(model: PreTrainedModel, plan: SplitPlan, settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration of LoRA on every linear map of the adapter layers of `model`, and of no other."""
    layers = layers_of(model)
    positions = plan.adapter_positions(len(layers))
    example = layers[positions[0]]
    names = linear_names(example)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        layers_to_transform=positions,
        layers_pattern=family_of(model).layers.rpartition(".")[2],
        fan_in_fan_out=family_of(model).transposed,
        bias="none",
    )


def merged_adapter_state(model: PreTrainedModel | PeftModel, plan: SplitPlan) -> dict[str, torch.Tensor]:
    """The tuned adapter layers as plain tensors named by bundle position, LoRA updates merged in.

    `model` is left unmerged.
    """
    if not isinstance(model, PeftModel):
        return {name: tensor.detach().clone() for name, tensor in adapter_state(model, plan).items()}
    with _merged(model):
        plain = adapter_state(model.get_base_model(), plan)  # type: ignore[arg-type]
        return {
            name.replace(".base_layer.", "."): tensor.detach().clone()
            for name, tensor in plain.items()
            if ".lora_" not in name
        }


@contextmanager
def _merged(model: PeftModel) -> Iterator[None]:
    # Merging adds to the base weights and unmerging subtracts, which drifts; the weights are put back instead.
    kept = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith((".base_layer.weight", ".base_layer.bias"))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in kept.items():
                parameters[name].copy_(tensor)


def trainable_parameters(model: nn.Module) -> int:
    """How many scalars have gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
