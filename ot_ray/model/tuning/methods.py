"""The table of tuning methods, and what they have in common: preparing a model, reading what was tuned.

What a method tunes is in the file of its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ot_ray.model.families import head_of
from ot_ray.model.split import SplitPlan, adapter_state
from ot_ray.model.tuning import bitfit, bottleneck, full, lora
from ot_ray.model.tuning.bottleneck import BottleneckSettings
from ot_ray.model.tuning.lora import LoraSettings

Method = Literal["full", "lora", "bottleneck", "bitfit"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class _Settings:
    """The settings of every method that has any."""

    lora: LoraSettings
    bottleneck: BottleneckSettings


_PREPARE: dict[Method, Callable[[PreTrainedModel, SplitPlan, _Settings], PreTrainedModel | PeftModel]] = {
    "full": lambda model, plan, settings: full.prepare(model, plan),
    "lora": lambda model, plan, settings: lora.prepare(model, plan, settings.lora),
    "bottleneck": lambda model, plan, settings: bottleneck.prepare(model, plan, settings.bottleneck),
    "bitfit": lambda model, plan, settings: bitfit.prepare(model, plan),
}


def prepare_tuning(
    model: PreTrainedModel,
    plan: SplitPlan,
    method: Method,
    lora: LoraSettings | None = None,
    bottleneck: BottleneckSettings | None = None,
) -> PreTrainedModel | PeftModel:
    """Leave gradients on for what `method` tunes in the adapter layers of an emulated (or full) model, and for the
    whole classification head of an image model.

    The Offsite-Tuning paper's Table 5 counts, for GPT2-XL and OPT-1.3B with two adapter layers at each end: 123M and
    201M with `full`, 1.65M and 2.11M with `bottleneck` (size 64), 410K and 590K with `lora` (rank 4), 83K and 106K
    with `bitfit`.

    Args:
        lora, bottleneck: settings of these methods; unset, their defaults.

    Returns:
        `model` itself, with bottlenecks in it for `bottleneck`; a `PeftModel` around it for `lora`.

    Raises:
        UnsupportedModelError: the architecture is set up to pass by its linear maps, which `lora` and `bottleneck`
            change.
    """
    settings = _Settings(lora or LoraSettings(), bottleneck or BottleneckSettings())
    prepared, head = _PREPARE[method](model, plan, settings), head_of(model)
    if head is not None:
        head.requires_grad_(True)
    return prepared


def merged_adapter_state(model: PreTrainedModel | PeftModel, plan: SplitPlan) -> dict[str, torch.Tensor]:
    """The tuned adapter layers as plain tensors named by bundle position, LoRA updates merged in.

    Bottlenecks are tensors of their own among them. `model` is left as it was.
    """
    if isinstance(model, PeftModel):
        return lora.merged_state(model, plan)
    return {name: tensor.detach().clone() for name, tensor in adapter_state(model, plan).items()}


def trainable_parameters(model: nn.Module) -> int:
    """How many scalars have gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
