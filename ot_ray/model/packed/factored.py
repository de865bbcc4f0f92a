"""Emulator layers with smaller maps: attention as products of low rank, and an MLP with fewer channels.

Their shapes alone; which factors and channels they hold is worked out in choice/factors.py."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ot_ray.model.families import Family, family_of, layers_of, linear_names
from ot_ray.model.split import SplitPlan


class Shares(Protocol):
    """`EmulatorConfig` or `PackedFormat`."""

    @property
    def attention_rank(self) -> float | None: ...

    @property
    def mlp_channels(self) -> float | None: ...


class LowRankLinear(nn.Linear):
    """``y = up(W x)``, in the place of a linear map. W [rank, in] goes by the name of that map's own weight, whose
    shape is never the same: who knows nothing of factors cannot open a checkpoint of them."""

    up: nn.Module
    """The other factor, `nn.Linear` from rank to out; where layers are packed or learn to be, what stands for it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.up(super().forward(input))


def up_of(linear: nn.Module) -> nn.Module | None:
    """The second factor of a map of low rank, None for one that is whole; what replaces the first goes on to it."""
    return linear.up if isinstance(linear, LowRankLinear) else None


def with_smaller_layers(model: PreTrainedModel, plan: SplitPlan, shares: Shares) -> PreTrainedModel:
    """Give the emulator layers of an emulated model their smaller maps, in place, with values to be loaded."""
    for layer in layers_of(model)[plan.bottom : plan.bottom + plan.keep]:
        with_smaller_maps(layer, family_of(model), shares)
    return model


def attention_maps(layer: nn.Module, family: Family) -> list[str]:
    """Names of the linear maps of a layer's attention."""
    prefix = f"{family.attention_out.partition('.')[0]}."
    return [name for name in linear_names(layer) if name.startswith(prefix)]


def channel_maps(layer: nn.Module, family: Family) -> list[str]:
    """Names of the linear maps of a layer's MLP that make its channels, which `family.mlp_out` reads."""
    attention = attention_maps(layer, family)
    return [name for name in linear_names(layer) if name not in attention and name != family.mlp_out]


def factored_rank(columns: int, rows: int, share: float | None) -> int | None:
    """The rank of a map that is factored; None for one that stays whole because its factors would be larger."""
    if share is None:
        return None
    rank = max(1, round(share * min(columns, rows)))
    return rank if rank * (columns + rows) < columns * rows else None


def kept_channels(channels: int, share: float | None) -> int:
    """How many of an MLP's channels stay; fewer than all for a share below 1."""
    return channels if share is None else max(1, int(share * channels + 1e-9))


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def with_smaller_maps(layer: nn.Module, family: Family, shares: Shares) -> nn.Module:
    """Put smaller maps in the place of a layer's own, where the shares make them so; their values are to be filled.

    The tensors of a map of low rank are `<map>.weight` [rank, in], `<map>.up.weight` [out, rank] and `<map>.up.bias`.
    Maps of an MLP with fewer channels keep their names. All are stored [out, in], in every family.

    Returns:
        `layer`, changed in place; on its own device, in its own type.
    """
    for name in attention_maps(layer, family):
        linear = layer.get_submodule(name)
        columns, rows = sizes(linear)
        rank = factored_rank(columns, rows, shares.attention_rank)
        if rank is not None:
            factored = _like(linear, columns, rank, bias=False, kind=LowRankLinear)
            factored.up = _like(linear, rank, rows, linear.bias is not None)
            layer.set_submodule(name, factored)
    if shares.mlp_channels is not None:
        out = layer.get_submodule(family.mlp_out)
        columns, rows = sizes(out)
        kept = kept_channels(columns, shares.mlp_channels)
        for name in channel_maps(layer, family):
            linear = layer.get_submodule(name)
            layer.set_submodule(name, _like(linear, sizes(linear)[0], kept, linear.bias is not None))
        layer.set_submodule(family.mlp_out, _like(out, kept, rows, out.bias is not None))
    return layer


def _like(linear: nn.Module, columns: int, rows: int, bias: bool, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    with torch.device("meta"):
        smaller = kind(columns, rows, bias, dtype=weight.dtype)
    smaller = smaller.to_empty(device=weight.device).requires_grad_(weight.requires_grad)
    with torch.no_grad():
        for parameter in smaller.parameters():
            # What nobody fills is not to pass for weights.
            parameter.fill_(float("nan"))
    return smaller
