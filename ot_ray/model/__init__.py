"""Splitting, emulating, distilling and plugging in: torch and transformers only; no files, Ray or HTTP."""

from ot_ray.model.distill import DistillLoss, DistillModel, next_token_loss, normalized_mse
from ot_ray.model.emulator import load_emulator, uniform_layers
from ot_ray.model.families import FAMILIES, Family, check_supported, family_of
from ot_ray.model.isolation import isolated_documents
from ot_ray.model.language import LanguageModel
from ot_ray.model.loading import ModelConfig, check_fits, load_model, load_tokenizer
from ot_ray.model.split import SplitPlan, adapter_state, depth_of, emulate, plug_in
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
    "Family",
    "LanguageModel",
    "LoraSettings",
    "Method",
    "ModelConfig",
    "SplitPlan",
    "adapter_state",
    "check_fits",
    "check_supported",
    "depth_of",
    "emulate",
    "family_of",
    "isolated_documents",
    "load_emulator",
    "load_model",
    "load_tokenizer",
    "merged_adapter_state",
    "next_token_loss",
    "normalized_mse",
    "plug_in",
    "prepare_tuning",
    "trainable_parameters",
    "uniform_layers",
]
