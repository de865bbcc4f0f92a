"""A linear map whose weight stays packed in memory: bits and bytes between passes, dense only while it multiplies.

Learning under compression is in learning.py, opening packed checkpoints in checkpoint.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ot_ray.errors import SplitError
from ot_ray.model.packed.codes import pack, packed_bytes, unpack
from ot_ray.model.packed.format import PackedFormat
from ot_ray.model.packed.rounding import Quantized, dequantize, groups_of, kept_mask, pruned_count, quantize


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b`` with a frozen, packed W [out, in]. Gradients flow to x and b.

    Its tensors, all flat but the groups':
        `weight`: quantized, the codes of the weights that stay (uint8); else those weights themselves.
        `mask`: one bit a weight, 1 where it stays (uint8); only where the format prunes.
        `group_scale`, `group_zero`: [out, groups], float32 and uint8; only where it quantizes.
        `bias`: [out], as it was.
    """

    weight: Tensor
    mask: Tensor | None
    group_scale: Tensor | None
    group_zero: Tensor | None
    up: nn.Module | None
    """Applied to y: the second factor of a map of low rank, whose first is W."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: PackedFormat,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        size = in_features * out_features
        kept = size - pruned_count(size, format.sparsity)

        def empty(shape: tuple[int, ...], dtype: torch.dtype | None, wanted: bool = True) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=device) if wanted else None

        quantized = format.bits is not None
        groups = (out_features, groups_of(in_features, format.group_size))
        codes = empty((packed_bytes(kept, format.bits),), torch.uint8) if format.bits is not None else None
        self.register_buffer("weight", codes if quantized else empty((kept,), dtype))
        self.register_buffer("mask", empty((packed_bytes(size, 1),), torch.uint8, format.sparsity > 0))
        self.register_buffer("group_scale", empty(groups, torch.float32, quantized))
        self.register_buffer("group_zero", empty(groups, torch.uint8, quantized))
        vector = empty((out_features,), dtype, bias)
        self.bias = None if vector is None else nn.Parameter(vector, requires_grad=False)
        self.up = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, format: PackedFormat, name: str = "a weight") -> PackedLinear:
        """Pack a weight [out, in].

        Raises:
            SplitError: it is not finite; `name` says which.
        """
        if not torch.isfinite(weight).all():
            raise SplitError(f"{name} holds NaN or infinity, which cannot be packed; use weights that are finite")
        rows, columns = weight.shape
        packed = cls(columns, rows, bias is not None, format, weight.device, weight.dtype)
        mask = kept_mask(weight, format.sparsity) if format.sparsity else None
        values = weight.detach() if mask is None else weight.detach() * mask
        if format.bits is not None:
            values, packed.group_scale, packed.group_zero = quantize(values, format.bits, format.group_size)
        values = values.reshape(-1) if mask is None else values[mask]
        packed.weight = values.clone() if format.bits is None else pack(values, format.bits)
        if mask is not None:
            packed.mask = pack(mask.to(torch.uint8), 1)
        if bias is not None:
            packed.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return packed

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in]: the stored values, or ``(code - zero) * scale`` in float32; cast to `dtype` if one is given."""
        shape = (self.out_features, self.in_features)
        mask = None if self.mask is None else unpack(self.mask, 1, shape[0] * shape[1]).bool().view(shape)
        values = self._values(shape, mask)
        return values if dtype is None else values.to(dtype)

    def _values(self, shape: tuple[int, int], mask: Tensor | None) -> Tensor:
        bits = self.format.bits
        if bits is None:
            assert mask is not None, "what is packed is pruned or quantized"
            return torch.zeros(shape, dtype=self.weight.dtype, device=self.weight.device).masked_scatter_(
                mask, self.weight
            )
        assert self.group_scale is not None and self.group_zero is not None
        size = shape[0] * shape[1]
        codes = unpack(self.weight, bits, size - pruned_count(size, self.format.sparsity))
        if mask is not None:
            # The code of 0, which pruned weights have.
            zeros = self.group_zero.repeat_interleave(self.format.group_size, dim=1)[:, : shape[1]].contiguous()
            codes = zeros.masked_scatter_(mask, codes)
        return dequantize(Quantized(codes.view(shape), self.group_scale, self.group_zero), self.format.group_size)

    def forward(self, x: Tensor) -> Tensor:
        y = _Through.apply(x, self.bias, self)
        return y if self.up is None else self.up(y)  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """A scale in bfloat16 would move every weight of its group, so a cast of the model leaves it in float32."""
        exact = self.group_scale
        super()._apply(fn, recurse)
        if exact is not None and self.group_scale is not None and self.group_scale.dtype != exact.dtype:
            self.group_scale = exact.to(self.group_scale.device)
        return self

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.format.bits}, sparsity={self.format.sparsity}"


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear map of `x` is computed, autocast considered."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Through(torch.autograd.Function):
    """The product, which unpacks W once more on the way back instead of keeping it dense in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: PackedLinear) -> Tensor:
        ctx.packed, ctx.dtype, ctx.given = packed, product_dtype(x), x.dtype
        return F.linear(x.to(ctx.dtype), packed.dense(ctx.dtype), None if bias is None else bias.to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].to(ctx.dtype)
        by_x = (grad @ ctx.packed.dense(ctx.dtype)).to(ctx.given) if ctx.needs_input_grad[0] else None
        by_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return by_x, by_bias, None
