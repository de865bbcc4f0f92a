"""Codings of inputs and gradients: fewer bits a value, for networks that are slower than the fit.

Files of them are gradient_files.py's, which also measures what a coding costs."""

from __future__ import annotations

import torch
from torch import Tensor

CODINGS = ("none", "bfloat16", "int8", "fp8")
"""`none` keeps every value. `bfloat16` rounds to that. `int8` and `fp8` (e4m3) round each position by a float32 scale
of its own. Ids at an embedding are kept in all of them."""
SCALED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Those with scales, and the type that they are kept in."""

_HIGHEST = {"int8": 127.0, "fp8": 448.0}


def encode(values: Tensor, coding: str) -> tuple[Tensor, Tensor | None]:
    """Values in a coding, and float32 scales [N] where it has them.

    Args:
        values: [N, ...], on any device. Integers stay what they are.
        coding: one of `CODINGS`.

    Returns:
        What `decode` takes. NaN and infinity stay such, in the scales.
    """
    if coding == "none" or not values.is_floating_point():
        return values, None
    if coding == "bfloat16":
        return values.to(torch.bfloat16), None
    flat = values.reshape(len(values), -1).to(torch.promote_types(values.dtype, torch.float32))
    scales = (flat.abs().amax(dim=1) / _HIGHEST[coding]).float()
    divisors = torch.where(scales > 0, scales, 1.0).to(flat.dtype)[:, None]
    shares = (flat / divisors).nan_to_num(0.0).clamp(-_HIGHEST[coding], _HIGHEST[coding])
    coded = shares.round() if coding == "int8" else shares.float()
    return coded.to(SCALED[coding]).reshape(values.shape), scales


def decode(coded: Tensor, scales: Tensor | None) -> Tensor:
    """What `encode` was given, but for its rounding; float32 where there are scales."""
    if scales is None:
        return coded
    return coded.float() * scales.reshape(-1, *[1] * (coded.dim() - 1))
