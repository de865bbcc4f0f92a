"""Splitting, emulating, distilling and plugging in: torch and transformers only; no files, Ray or HTTP."""

from ot_ray.model.distill import DistillModel, DistillOptions
from ot_ray.model.emulator import EmulatorConfig, load_emulator, uniform_layers
from ot_ray.model.families import (
    FAMILIES,
    IMAGE_FAMILIES,
    TEXT_FAMILIES,
    Family,
    auto_class,
    check_supported,
    family_of,
    layer_config,
)
from ot_ray.model.head import check_classes, classes_in, classes_of, prepare_head
from ot_ray.model.images import ImageDistillModel, ImageModel
from ot_ray.model.isolation import isolated_documents
from ot_ray.model.language import LanguageModel
from ot_ray.model.loading import ModelConfig, check_tokenizer
from ot_ray.model.losses import DistillLoss, LanguageHead, normalized_mse
from ot_ray.model.packed import PackedFormat, PackedLinear, compress
from ot_ray.model.skeleton import checkpoint_name, empty_model, fill
from ot_ray.model.split import SplitPlan, adapter_state, depth_of, emulate, emulated_layers, plug_in
from ot_ray.model.tuning import (
    METHODS,
    BottleneckSettings,
    LoraSettings,
    Method,
    merged_adapter_state,
    prepare_tuning,
    trainable_parameters,
)

__all__ = [
    "FAMILIES",
    "IMAGE_FAMILIES",
    "METHODS",
    "TEXT_FAMILIES",
    "BottleneckSettings",
    "DistillLoss",
    "DistillModel",
    "DistillOptions",
    "EmulatorConfig",
    "Family",
    "ImageDistillModel",
    "ImageModel",
    "LanguageHead",
    "LanguageModel",
    "LoraSettings",
    "Method",
    "ModelConfig",
    "PackedFormat",
    "PackedLinear",
    "SplitPlan",
    "adapter_state",
    "auto_class",
    "check_classes",
    "check_supported",
    "check_tokenizer",
    "checkpoint_name",
    "classes_in",
    "classes_of",
    "compress",
    "depth_of",
    "empty_model",
    "emulate",
    "emulated_layers",
    "family_of",
    "fill",
    "isolated_documents",
    "layer_config",
    "load_emulator",
    "merged_adapter_state",
    "normalized_mse",
    "plug_in",
    "prepare_head",
    "prepare_tuning",
    "trainable_parameters",
    "uniform_layers",
]
