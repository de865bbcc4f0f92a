"""Linear maps of an emulator that is being distilled: they compute as the packed ones will, and learn nevertheless.

Pruned weights start at 0 and stay there; quantization lets gradients straight through (Bengio et al., 2013)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ot_ray.model.emulator import EmulatorConfig
from ot_ray.model.families import linear_names
from ot_ray.model.packed.factored import up_of
from ot_ray.model.packed.linear import product_dtype
from ot_ray.model.packed.rounding import prune, rounded


class LearningLinear(nn.Module):
    """``y = x C(W)ᵀ + b``, C as the emulator is compressed. W and b keep their names, shapes and places; so does the
    second factor, which goes on from y where W is the first of a map of low rank.

    Pruned weights are those that are 0: none of them gets a gradient, so optimiser steps leave them where they are,
    in whatever shards they lie.
    """

    def __init__(self, linear: nn.Linear | Conv1D, config: EmulatorConfig) -> None:
        super().__init__()
        self.weight, self.bias, self.up = linear.weight, linear.bias, up_of(linear)
        self.transposed, self.config = isinstance(linear, Conv1D), config
        if config.sparsity and not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(prune(self.weight, config.sparsity))

    def compressed(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """C(W) [out, in] in `dtype`; bit by bit what the packed map multiplies with."""
        # The layout of the packed map's, so that products are rounded alike.
        weight = (weight.t() if self.transposed else weight).contiguous()
        bits = self.config.bits
        return (weight if bits is None else rounded(weight, bits, self.config.group_size)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _Straight.apply(x, self.weight, self.bias, self)
        return y if self.up is None else self.up(y)  # type: ignore[no-any-return]


class _Straight(torch.autograd.Function):
    """The product with C(W), which is computed once more on the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: LearningLinear) -> Tensor:
        ctx.module, ctx.dtype, ctx.given = module, product_dtype(x), x.dtype
        ctx.save_for_backward(x, weight)
        compressed = module.compressed(weight.detach(), ctx.dtype)
        return F.linear(x.to(ctx.dtype), compressed, None if bias is None else bias.to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        module: LearningLinear = ctx.module
        grad = grads[0].to(ctx.dtype)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = (grad @ module.compressed(weight.detach(), ctx.dtype)).to(ctx.given)
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            inputs = x.to(ctx.dtype).flatten(0, -2)
            by_weight = (inputs.t() @ rows if module.transposed else rows.t() @ inputs).to(weight.dtype)
            if module.config.sparsity:
                by_weight = by_weight * (weight != 0)
        if ctx.needs_input_grad[2]:
            by_bias = rows.sum(0)
        return by_x, by_weight, by_bias, None


def learn_compressed(layer: nn.Module, config: EmulatorConfig) -> nn.Module:
    """Have every linear map of a layer compute as it will when it is packed, in place.

    Weights that are not on the meta device are pruned; whoever fills the others prunes them (`prune`).
    """
    for name in linear_names(layer) if config.packed else ():
        layer.set_submodule(name, LearningLinear(layer.get_submodule(name), config))  # type: ignore[arg-type]
    return layer
