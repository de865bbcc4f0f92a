"""Tuning methods: what inside the adapter layers of an emulated model is trainable; one file a method.

Saving what was tuned is in artifacts; the loop that tunes is in training."""

from ot_ray.model.tuning.bottleneck import BottleneckSettings
from ot_ray.model.tuning.lora import LoraSettings
from ot_ray.model.tuning.methods import (
    METHODS,
    Method,
    merged_adapter_state,
    prepare_tuning,
    trainable_parameters,
)

__all__ = [
    "METHODS",
    "BottleneckSettings",
    "LoraSettings",
    "Method",
    "merged_adapter_state",
    "prepare_tuning",
    "trainable_parameters",
]
