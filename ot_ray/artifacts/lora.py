"""LoRA in PEFT's files: which configurations are harmless, which tensors belong to one, how it merges.

Reading and refusing whole adapters is left to inspection.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from ot_ray.artifacts.manifest import BundleManifest
from ot_ray.config import Config
from ot_ray.model import FAMILIES

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"

PEFT_PREFIX = "base_model.model."

ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,7}$", max_length=128)]
Empty = Annotated[dict[str, Any], Field(max_length=0)]


class LoraAdapterConfig(Config):
    """`adapter_config.json` as PEFT 0.21 writes it, closed to what is not plain LoRA on linear maps.

    Fields of one allowed value are variants of LoRA that merge differently, or that name code.
    """

    peft_type: Literal["LORA"]
    """Kind of adapter."""
    r: int = Field(ge=1)
    """Rank."""
    lora_alpha: float = Field(gt=0)
    """Scale: updates are multiplied by lora_alpha / r."""
    target_modules: list[ModuleName] = Field(min_length=1, max_length=64)
    """Names, or ends of names, of the linear maps inside a layer."""
    layers_to_transform: list[int]
    """Positions of the adapter layers in the bundle."""
    fan_in_fan_out: bool = False
    """Whether weights are stored as [in, out]."""
    layers_pattern: str | list[str] | None = None
    """Name of the layer list."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Used while tuning only."""
    task_type: Literal["CAUSAL_LM"] | None = None
    """Task."""
    base_model_name_or_path: str | None = Field(default=None, max_length=512)
    """What the tuner called its base model; not read."""
    revision: str | None = Field(default=None, max_length=128)
    """Not read."""
    peft_version: str | None = Field(default=None, max_length=64)
    """Not read."""
    inference_mode: bool = True
    """Not read."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """Start of the updates; not read."""
    qalora_group_size: int = 16
    """Not read, because use_qalora is false."""
    megatron_core: str | None = Field(default="megatron.core", pattern=r"^megatron\.core$")
    """Not read, because megatron_config is null."""

    bias: Literal["none"] = "none"
    use_dora: Literal[False] = False
    use_rslora: Literal[False] = False
    use_qalora: Literal[False] = False
    use_bdlora: Literal[False] | None = None
    lora_bias: Literal[False] = False
    ensure_weight_tying: Literal[False] = False
    alpha_pattern: Empty = Field(default_factory=dict)
    rank_pattern: Empty = Field(default_factory=dict)
    loftq_config: Empty | None = None
    alora_invocation_tokens: None = None
    arrow_config: None = None
    auto_mapping: None = None
    corda_config: None = None
    eva_config: None = None
    exclude_modules: None = None
    kasa_config: None = None
    layer_replication: None = None
    lora_ga_config: None = None
    megatron_config: None = None
    modules_to_save: None = None
    monteclora_config: None = None
    target_parameters: None = None
    trainable_token_indices: None = None
    velora_config: None = None


def contradictions(config: LoraAdapterConfig, bundle: BundleManifest, max_rank: int) -> list[str]:
    """One line for each field that does not fit the bundle; empty if all do."""
    problems = []
    if config.r > max_rank:
        problems.append(f"{LORA_CONFIG}: r is {config.r}; use at most {max_rank}")
    positions = bundle.plan.adapter_positions(bundle.plan.depth)
    if sorted(config.layers_to_transform) != positions:
        problems.append(
            f"{LORA_CONFIG}: layers_to_transform is {config.layers_to_transform}; the adapter layers are {positions}"
        )
    pattern = FAMILIES[bundle.model_type].layers.rpartition(".")[2]
    if config.layers_pattern not in (None, pattern, [pattern]):
        problems.append(f"{LORA_CONFIG}: layers_pattern is {config.layers_pattern!r}; use {pattern!r}")
    if config.fan_in_fan_out != FAMILIES[bundle.model_type].transposed:
        problems.append(
            f"{LORA_CONFIG}: fan_in_fan_out is {config.fan_in_fan_out}; for {bundle.model_type} use "
            f"{not config.fan_in_fan_out}"
        )
    maps = [name.removesuffix(".weight") for name, _ in _linear_weights(bundle)]
    problems += [
        f"{LORA_CONFIG}: target_modules names {target!r}, which is no linear map of the adapter layers"
        for target in config.target_modules
        if not any(_matches(name, [target]) for name in maps)
    ]
    return problems


def lora_shapes(config: LoraAdapterConfig, bundle: BundleManifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a LoRA adapter: A is [r, in], B is [out, r]."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in _linear_weights(bundle):
        if not _matches(name.removesuffix(".weight"), config.target_modules):
            continue
        inputs, outputs = (rows, columns) if FAMILIES[bundle.model_type].transposed else (columns, rows)
        shapes[_lora_name(name, "A")] = (config.r, inputs)
        shapes[_lora_name(name, "B")] = (outputs, config.r)
    return shapes


def merge(
    config: LoraAdapterConfig,
    bundle: BundleManifest,
    tensors: Mapping[str, torch.Tensor],
    original: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """``W + (alpha / r) B A`` for every map that is tuned (equation 3 of the LoRA paper, section 4.1).

    Args:
        tensors: those of `lora_shapes`.
        original: the untuned adapter, under the bundle's tensor names.

    Returns:
        The whole tuned adapter under the same names; sums are made in float32, tensors keep their dtype.
    """
    scale = config.lora_alpha / config.r
    merged = {name: tensor.detach().clone() for name, tensor in original.items()}
    for name, _ in _linear_weights(bundle):
        down, up = tensors.get(_lora_name(name, "A")), tensors.get(_lora_name(name, "B"))
        if down is None or up is None:
            continue
        update = up.float() @ down.float()
        if FAMILIES[bundle.model_type].transposed:
            update = update.T
        weight = original[name]
        merged[name] = (weight.detach().float() + (update * scale).to(weight.device)).to(weight.dtype)
    return merged


def _linear_weights(bundle: BundleManifest) -> Iterator[tuple[str, tuple[int, int]]]:
    # Inside a transformer layer, matrices are linear maps; norms and biases are vectors.
    for entry in bundle.adapter:
        if len(entry.shape) == 2 and entry.name.endswith(".weight"):
            yield entry.name, (entry.shape[0], entry.shape[1])


def _lora_name(weight: str, factor: Literal["A", "B"]) -> str:
    return f"{PEFT_PREFIX}{weight.removesuffix('weight')}lora_{factor}.weight"


def _matches(module: str, targets: Sequence[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)
