"""Packing the emulator layers of a model, and having Transformers open checkpoints in which they are packed.

Importing this module tells Transformers of the format; no code comes with a checkpoint."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ot_ray.errors import ArtifactError
from ot_ray.model.emulator import EmulatorConfig
from ot_ray.model.families import check_maps_are_called, family_of, layers_of, linear_names
from ot_ray.model.packed.factored import up_of, with_smaller_maps
from ot_ray.model.packed.format import METHOD, PackedFormat
from ot_ray.model.packed.linear import PackedLinear
from ot_ray.model.packed.rounding import prune
from ot_ray.model.split import SplitPlan


def compress(model: PreTrainedModel, plan: SplitPlan, config: EmulatorConfig) -> PreTrainedModel:
    """Prune and quantize the linear maps of the emulator layers, in place; they are packed from then on, and frozen.

    Embeddings, norms, biases and the adapter layers stay as they are.

    Args:
        model: the emulated model, with weights; smaller maps are there already (`with_smaller_layers`).
        config: pruning comes first, then quantizing; where it asks for neither, weights stay as they are.

    Returns:
        `model`, which is what `from_pretrained` makes of its checkpoint.

    Raises:
        SplitError: a weight is not finite.
        UnsupportedModelError: the architecture is set up to pass by its linear maps.
    """
    if not config.compressed:
        return model
    check_maps_are_called(model.config)
    format = PackedFormat(
        first_layer=plan.bottom,
        layers=plan.keep,
        sparsity=config.sparsity,
        bits=config.bits,
        group_size=config.group_size,
        attention_rank=config.attention_rank,
        mlp_channels=config.mlp_channels,
    )
    layers = layers_of(model)
    for place in range(plan.bottom, plan.bottom + plan.keep):
        for name in linear_names(layers[place]) if config.packed else ():
            linear = layers[place].get_submodule(name)
            layers[place].set_submodule(name, _packed(linear, format, f"{place}.{name}.weight"))
    quantizer = PackedQuantizer(PackedConfig(**format.model_dump()))
    quantizer.preprocess_model(model, already=True)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    return model


def _packed(linear: nn.Module, format: PackedFormat, name: str) -> PackedLinear:
    weight: Any = prune(linear.weight, format.sparsity)  # type: ignore[arg-type]
    weight = weight.t().contiguous() if isinstance(linear, Conv1D) else weight
    packed = PackedLinear.of(weight, linear.bias, format, name)  # type: ignore[arg-type]
    packed.up = up_of(linear)
    return packed


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """A `PackedFormat`, as Transformers carries it.

    Raises:
        ArtifactError: a setting is unknown or out of range.
    """

    def __init__(self, **settings: Any) -> None:
        try:
            values = PackedFormat(**settings).model_dump()
        except ValidationError as error:
            lines = (
                f"{'.'.join(map(str, item['loc']))} is {item['input']!r}: {item['msg']}" for item in error.errors()
            )
            raise ArtifactError(
                f"config.json: quantization_config cannot be read: {'; '.join(lines)}; write the bundle anew, or use a "
                "newer version of ot_ray"
            ) from None
        # Whatever lies in __dict__ is what Transformers writes.
        self.__dict__.update(values)

    @property
    def format(self) -> PackedFormat:
        """What it says."""
        return PackedFormat(**self.__dict__)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts `PackedLinear` in place of the emulator layers' linear maps before a checkpoint's tensors are loaded."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, already: bool = False, **kwargs: Any
    ) -> PreTrainedModel:
        # A scale in bfloat16 would move every weight of its group.
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "group_scale"}
        if already:
            return model
        packed: Any = self.quantization_config
        format, layers = packed.format, layers_of(model)
        last = format.first_layer + format.layers
        if last > len(layers):
            raise ArtifactError(
                f"config.json: quantization_config names layers up to {last - 1}, but the model has {len(layers)}; "
                "write the bundle anew"
            )
        for layer in layers[format.first_layer : last]:
            with_smaller_maps(layer, family_of(model), format)
            for name in linear_names(layer) if format.packed else ():
                layer.set_submodule(name, _empty(layer.get_submodule(name), format))
        return model

    def is_serializable(self) -> bool:  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
        """What is around the packed layers can be tuned: gradients pass through them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Asked by Transformers' trainer where no PEFT model is tuned."""
        return True


def _empty(linear: nn.Module, format: PackedFormat) -> PackedLinear:
    weight, bias = linear.weight, linear.bias
    columns, rows = weight.shape if isinstance(linear, Conv1D) else reversed(weight.shape)  # type: ignore[arg-type]
    packed = PackedLinear(columns, rows, bias is not None, format, weight.device, weight.dtype)  # type: ignore[arg-type]
    packed.up = up_of(linear)
    return packed
