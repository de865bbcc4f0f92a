"""The files of a bundle that Transformers reads: weights in two shards, configurations, tokenizer.

They are written without what would tell of the full model or of the machine they come from. The manifest
and the signature are left to bundle.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from transformers import (
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ot_ray.artifacts.manifest import Dtype, TensorEntry
from ot_ray.errors import ArtifactError
from ot_ray.model import SplitPlan, family_of
from ot_ray.model.packed import PackedConfig

ADAPTER_WEIGHTS = "adapter.safetensors"
EMULATOR_WEIGHTS = "emulator.safetensors"
PROCESSOR = "preprocessor_config.json"

DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Where a tokenizer came from on the machine that made it, and code of its own.
_PRIVATE_TOKENIZER_KEYS = (
    "_commit_hash",
    "added_tokens_file",
    "auto_map",
    "cache_dir",
    "is_local",
    "local_files_only",
    "merges_file",
    "name_or_path",
    "special_tokens_map_file",
    "token",
    "tokenizer_file",
    "vocab_file",
)
_PRIVATE_PROCESSOR_KEYS = ("_commit_hash", "_name_or_path", "auto_map", "name_or_path")
# Layer numbers of the full model.
_LAYER_NUMBERS = ("assistant_early_exit", "dola_layers")

T = TypeVar("T", PreTrainedConfig, GenerationConfig)


def layer_prefixes(model_type_layers: str, plan: SplitPlan) -> tuple[str, ...]:
    """What the names of adapter tensors start with, given the path of the layer list."""
    return tuple(f"{model_type_layers}.{position}." for position in plan.adapter_positions(plan.depth))


def write_weights(folder: Path, model: PreTrainedModel, plan: SplitPlan) -> tuple[TensorEntry, ...]:
    """Write both shards and the index that joins them; a head tied to the embeddings is stored once.

    Returns:
        The tensors of the adapter layers, sorted by name; a classification head lies beside them.

    Raises:
        ArtifactError: a tensor is of a dtype that bundles don't hold.
    """
    family = family_of(model)
    prefixes = layer_prefixes(family.layers, plan)
    own = (*prefixes, f"{family.head}.") if family.head else prefixes
    state = _stored_tensors(model)
    _check_types(state, own)
    shards = {
        ADAPTER_WEIGHTS: {name: tensor for name, tensor in state.items() if name.startswith(own)},
        EMULATOR_WEIGHTS: {name: tensor for name, tensor in state.items() if not name.startswith(own)},
    }
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in sorted(tensors)},
    }
    _write_json(folder / "model.safetensors.index.json", index)
    adapter = {name: tensor for name, tensor in shards[ADAPTER_WEIGHTS].items() if name.startswith(prefixes)}
    return tuple(
        TensorEntry(name=name, shape=tuple(adapter[name].shape), dtype=DTYPES[adapter[name].dtype])
        for name in sorted(adapter)
    )


def write_configs(folder: Path, model: PreTrainedModel) -> None:
    """Write `config.json` and `generation_config.json` with the architecture's own fields and no others."""
    config = _own_fields(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    packed = getattr(model.config, "quantization_config", None)
    if isinstance(packed, PackedConfig):
        # What opens packed layers; `_own_fields` takes away whatever else stands there.
        config.quantization_config = packed
    if hasattr(config, "max_window_layers"):
        # A layer number of the full model; `layer_types` decides, so the value that follows from it tells nothing.
        types = list(config.layer_types)
        config.max_window_layers = types.index("sliding_attention") if "sliding_attention" in types else len(types)
    config.to_json_file(folder / "config.json")
    if getattr(model, "generation_config", None) is not None:
        generation = _own_fields(model.generation_config)
        for name in _LAYER_NUMBERS:
            if hasattr(generation, name):
                setattr(generation, name, None)
        generation.to_json_file(folder / "generation_config.json")


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer without the paths of the machine that it was read on."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {key: value for key, value in values.items() if key not in _PRIVATE_TOKENIZER_KEYS})


def write_processor(folder: Path, processor: BaseImageProcessor) -> None:
    """Write what prepares images, without where it was read."""
    processor.save_pretrained(folder)
    path = folder / PROCESSOR
    values = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {key: value for key, value in values.items() if key not in _PRIVATE_PROCESSOR_KEYS})


def _stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            stored[name] = tensor.contiguous()
        elif not tied:
            stored[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return stored


def _check_types(state: Mapping[str, torch.Tensor], adapter: tuple[str, ...]) -> None:
    for name, tensor in state.items():
        # Packed emulator layers hold bytes; what a customer tunes never does.
        if tensor.dtype not in DTYPES and (tensor.dtype != torch.uint8 or name.startswith(adapter)):
            raise ArtifactError(
                f"tensor {name} is of {tensor.dtype}; convert the model to one of "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )


def _own_fields(config: T) -> T:
    """A copy without fields that its class does not know, which may say anything, and without a text tower's shape,
    which image bundles do not hold and which may tell how deep the full model is."""
    clean = copy.deepcopy(config)
    known = vars(type(config)())
    for name in [name for name in vars(clean) if name not in known]:
        delattr(clean, name)
    for name, part in list(vars(clean).items()):
        if isinstance(part, PreTrainedConfig):
            setattr(clean, name, type(part)() if name == "text_config" else _own_fields(part))
    return clean


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
