"""Splitting, emulating, distilling and plugging in: torch and transformers only; no files, Ray or HTTP."""

from ot_ray.model.distill import DistillModel, DistillOptions
from ot_ray.model.emulator import load_emulator, uniform_layers
from ot_ray.model.families import FAMILIES, Family, check_supported, family_of
from ot_ray.model.isolation import isolated_documents
from ot_ray.model.language import LanguageModel
from ot_ray.model.loading import ModelConfig, check_tokenizer
from ot_ray.model.losses import DistillLoss, LanguageHead, normalized_mse
from ot_ray.model.skeleton import checkpoint_name, empty_model, fill
from ot_ray.model.split import SplitPlan, adapter_state, depth_of, emulate, emulated_layers, plug_in
from ot_ray.model.tuning import (
    METHODS,
    LoraSettings,
    Method,
    merged_adapter_state,
    prepare_tuning,
    trainable_parameters,
)

__all__ = [
    "FAMILIES",
    "METHODS",
    "DistillLoss",
    "DistillModel",
    "DistillOptions",
    "Family",
    "LanguageHead",
    "LanguageModel",
    "LoraSettings",
    "Method",
    "ModelConfig",
    "SplitPlan",
    "adapter_state",
    "check_supported",
    "check_tokenizer",
    "checkpoint_name",
    "depth_of",
    "empty_model",
    "emulate",
    "emulated_layers",
    "family_of",
    "fill",
    "isolated_documents",
    "load_emulator",
    "merged_adapter_state",
    "normalized_mse",
    "plug_in",
    "prepare_tuning",
    "trainable_parameters",
    "uniform_layers",
]
