"""A model's shape without its weights, and putting weights into it one tensor at a time.

Where the weights come from is left to artifacts, splitting them over ranks to training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ot_ray.errors import ArtifactError, UnsupportedModelError
from ot_ray.model.families import IMAGE_FAMILIES, auto_class, check_supported, family_of
from ot_ray.model.head import classes_in


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters take no memory, in evaluation mode.

    Args:
        config: the architecture; left as it was.
        dtype: type of the parameters.

    Returns:
        A model with parameters on the meta device, tied as the architecture ties them, and buffers on the
        CPU; buffers that no checkpoint holds (rotary frequencies) have their values.

    Raises:
        UnsupportedModelError: the architecture cannot be split, its weights are quantized, or it is an image model
            without classes.
    """
    check_supported(config.model_type)
    for name in settings_named("quantization_config", config.to_dict()):
        raise UnsupportedModelError(
            f"config.{name} is set: quantized weights cannot be distilled; use the model's "
            "float32, float16 or bfloat16 checkpoint"
        )
    if config.model_type in IMAGE_FAMILIES and not classes_in(config):
        raise UnsupportedModelError(
            "config.id2label names no class, so that the model has no head; name at least two classes there"
        )
    with torch.device("meta"):
        opened_by = auto_class(config.model_type)
        model = opened_by.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    family_of(model)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    # Computes the buffers, as `from_pretrained` has it do; on the meta device a parameter's draw does nothing.
    model.initialize_weights()
    return model.eval()


def settings_named(key: str, config: dict[str, Any]) -> Iterator[str]:
    """Dotted names of the settings of this name that are not null, anywhere in a configuration as JSON has it.

    Transformers reads some from a part of a configuration (`text_config`) where the whole does not say them.
    """
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        prefix, part = left.pop()
        entries = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for name, value in entries:
            if name == key and value is not None:
                yield f"{prefix}{name}"
            left.append((f"{prefix}{name}.", value))


def checkpoint_name(name: str, model: PreTrainedModel, available: Collection[str]) -> str:
    """Under which name a checkpoint holds a tensor of the model.

    Checkpoints may leave out the base model's prefix or add it (`h.0.ln_1.weight` is GPT-2's
    `transformer.h.0.ln_1.weight`), store tied tensors under either name, and spell parts of names as older
    versions of Transformers did.

    Args:
        name: the tensor's name in `model.state_dict()`.
        available: the names in the checkpoint.

    Raises:
        ArtifactError: the checkpoint does not hold it.
    """
    tied = model.all_tied_weights_keys
    partners = [tied[name]] if name in tied else [target for target, origin in tied.items() if origin == name]
    prefix = f"{model.base_model_prefix}."
    for candidate in (candidate for one in (name, *partners) for candidate in (one, older_name(one, model))):
        shorter = candidate.removeprefix(prefix)
        for spelling in (candidate, shorter if shorter != candidate else prefix + candidate):
            if spelling in available:
                return spelling
    raise ArtifactError(
        f"tensor {name} is not among the {len(available)} of the checkpoint; fetch or save the model's "
        "safetensors files anew"
    )


def older_name(name: str, model: PreTrainedModel) -> str:
    """How checkpoints spell the name of a tensor that Transformers renames as it loads; most are spelt as they are."""
    for ours, theirs in family_of(model).renamed:
        name = name.replace(ours, theirs)
    return name


def fill(module: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Give every parameter on the meta device its values, one tensor in memory beside the model's own.

    Tied parameters are read once and stay tied; persistent buffers are read as well.

    Args:
        module: a module that is not split over ranks; changed in place.
        read: the values of a parameter or persistent buffer by its name in `module`, of its shape and any
            floating-point type.

    Raises:
        ArtifactError: the values have another shape.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, leaf))
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        values = _values(read, name, parameter)
        filled = nn.Parameter(values, requires_grad=parameter.requires_grad)
        for owner, leaf in places[id(parameter)]:
            owner._parameters[leaf] = filled
    for name in sorted(module.state_dict().keys() & dict(module.named_buffers()).keys()):
        buffer = module.get_buffer(name)
        buffer.copy_(_values(read, name, buffer))


def _values(read: Callable[[str], torch.Tensor], name: str, wanted: torch.Tensor) -> torch.Tensor:
    values = read(name)
    if values.shape != wanted.shape:
        raise ArtifactError(
            f"tensor {name} has shape {tuple(values.shape)} in the checkpoint, but the model's is "
            f"{tuple(wanted.shape)}; config.json and the weights belong to different models"
        )
    return values.to(wanted.dtype)
