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


class LowRankLinear(nn.Module):
    """``y = up(down(x))``, in the place of a linear map."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    @property
    def weight(self) -> torch.Tensor:
        """Empty: the factors hold the values. GPT-2 initialises maps by this name when a checkpoint is opened."""
        return torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


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

    A map of low rank is ``up(down(x))``, and its tensors are `<map>.down.weight` [rank, in], `<map>.up.weight`
    [out, rank] and `<map>.up.bias`. Maps of an MLP with fewer channels keep their names. All are stored [out, in],
    in every family.

    Returns:
        `layer`, changed in place; on its own device, in its own type.
    """
    for name in attention_maps(layer, family):
        linear = layer.get_submodule(name)
        columns, rows = sizes(linear)
        rank = factored_rank(columns, rows, shares.attention_rank)
        if rank is not None:
            down, up = _like(linear, columns, rank, bias=False), _like(linear, rank, rows, linear.bias is not None)
            layer.set_submodule(name, LowRankLinear(down, up))
    if shares.mlp_channels is not None:
        out = layer.get_submodule(family.mlp_out)
        columns, rows = sizes(out)
        kept = kept_channels(columns, shares.mlp_channels)
        for name in channel_maps(layer, family):
            linear = layer.get_submodule(name)
            layer.set_submodule(name, _like(linear, sizes(linear)[0], kept, linear.bias is not None))
        layer.set_submodule(family.mlp_out, _like(out, kept, rows, out.bias is not None))
    return layer


def _like(linear: nn.Module, columns: int, rows: int, bias: bool) -> nn.Linear:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    with torch.device("meta"):
        smaller = nn.Linear(columns, rows, bias, dtype=weight.dtype)
    smaller = smaller.to_empty(device=weight.device).requires_grad_(weight.requires_grad)
    with torch.no_grad():
        for parameter in smaller.parameters():
            # What nobody fills is not to pass for weights.
            parameter.fill_(float("nan"))
    return smaller
