"""Method `lora`: low-rank updates of the adapter layers' linear maps, through PEFT.

PEFT's files as they come back are in artifacts/lora.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.model.families import check_maps_are_called, family_of, layers_of, linear_names
from ot_ray.model.split import SplitPlan, adapter_state


class LoraSettings(Config):
    """Low-rank adaptation of every linear map in the adapter layers (the paper's Table 5: rank 4, alpha 32)."""

    rank: int = Field(default=4, ge=1)
    """Rank r of each update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of each update while tuning."""


def prepare(model: PreTrainedModel, plan: SplitPlan, settings: LoraSettings) -> PeftModel:
    """Wrap `model`; only the updates have gradients.

    Raises:
        UnsupportedModelError: the architecture is set up to pass by its linear maps.
    """
    check_maps_are_called(model.config)
    model.requires_grad_(False)
    return get_peft_model(model, lora_config(model, plan, settings))  # type: ignore[return-value]


def lora_config(model: PreTrainedModel, plan: SplitPlan, settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration of LoRA on every linear map of the adapter layers of `model`, and of no other."""
    layers = layers_of(model)
    positions = plan.adapter_positions(len(layers))
    example = layers[positions[0]]
    names = linear_names(example)
    return LoraConfig(
        # PEFT's wrapper of image models has no task.
        task_type="CAUSAL_LM" if family_of(model).task == "text" else None,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        layers_to_transform=positions,
        layers_pattern=family_of(model).layers.rpartition(".")[2],
        fan_in_fan_out=family_of(model).transposed,
        bias="none",
    )


def merged_state(model: PeftModel, plan: SplitPlan) -> dict[str, torch.Tensor]:
    """The adapter layers with the updates merged in, named as `adapter_state` names them; `model` stays unmerged."""
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
