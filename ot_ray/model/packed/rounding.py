"""Pruning and quantizing one weight: which entries stay, and which code stands for each of them.

Letters: O rows (outputs), I columns (inputs), G groups of columns. How codes are stored is in codes.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def pruned_count(count: int, sparsity: float) -> int:
    """How many of `count` weights a share of `sparsity` takes away."""
    return int(sparsity * count)


def kept_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Which weights stay, the largest in magnitude: bool, of the weight's shape; equals go by their place.

    Unstructured magnitude pruning within one linear map (Offsite-Tuning, Figure 4).
    """
    magnitude = weight.detach().reshape(-1).float().abs()
    pruned = pruned_count(magnitude.numel(), sparsity)
    threshold = magnitude.kthvalue(pruned + 1).values
    mask = magnitude > threshold
    equal = (magnitude == threshold).nonzero().flatten()
    mask[equal[: magnitude.numel() - pruned - int(mask.sum())]] = True
    return mask.view(weight.shape)


def prune(weight: Tensor, sparsity: float) -> Tensor:
    """A copy with the smallest weights set to 0."""
    return weight.detach() * kept_mask(weight, sparsity) if sparsity else weight.detach().clone()


class Quantized(NamedTuple):
    """What stands for a weight [O, I]: ``w = (code - zero) * scale``, zero and scale those of its group of columns."""

    codes: Tensor
    """uint8 [O, I]."""
    scale: Tensor
    """float32 [O, G]."""
    zero: Tensor
    """uint8 [O, G]."""


def groups_of(columns: int, group_size: int) -> int:
    """Groups in a row; the last may be shorter."""
    return -(-columns // group_size)


def quantize(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """Round a weight to the nearest of ``2 ** bits`` evenly spaced values between its group's extremes.

    Zero is always among the values, so that what was pruned stays 0.

    Args:
        weight: [O, I], finite.
    """
    levels = (1 << bits) - 1
    grouped = _grouped(weight.detach().float(), group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    # Divided before they are subtracted: the difference of two large numbers may not be finite.
    scale = high / levels - low / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round_().clamp_(0, levels)
    codes = (grouped / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, levels)
    return Quantized(_rows(codes, weight.shape[1]).to(torch.uint8), scale, zero.to(torch.uint8))


def dequantize(quantized: Quantized, group_size: int) -> Tensor:
    """The weight that the codes stand for: float32 [O, I]."""
    codes, scale, zero = quantized
    grouped = _grouped(codes.float(), group_size).sub_(zero[..., None].float()).mul_(scale[..., None].float())
    return _rows(grouped, codes.shape[1])


def rounded(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """What quantizing makes of a weight: float32 [O, I]."""
    return dequantize(quantize(weight, bits, group_size), group_size)


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    """[O, I] -> [O, G, group_size], a copy; a last group that is short is filled with zeros."""
    padding = -rows.shape[1] % group_size
    rows = F.pad(rows, (0, padding)) if padding else rows.clone()
    return rows.view(rows.shape[0], -1, group_size)


def _rows(grouped: Tensor, columns: int) -> Tensor:
    return grouped.flatten(1)[:, :columns].contiguous()
