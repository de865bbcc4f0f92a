"""Small whole numbers as bits: n-bit codes and masks in bytes, without a bit to spare.

What the codes mean is left to rounding.py."""

from __future__ import annotations

import torch
from torch import Tensor

_FOLD = 8
"""Codes are padded to a multiple of this, so that every plane fills whole bytes."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `pack` makes of `count` codes."""
    return -(-count // _FOLD) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of `bits` bits each, 1 to 8.

    A code is cut into planes of 4, 2 and 1 bits, as many as make up `bits`, the lowest bits first (3 bits: a plane of
    2 and one of 1). In a plane of w bits, byte j holds, from its low bits on, entries j, j + m, j + 2m, ... of the 8/w
    stretches of m bytes' worth.

    Args:
        codes: uint8, of any shape, each below ``2 ** bits``; flattened, and padded with zeros.

    Returns:
        uint8 [`packed_bytes(codes.numel(), bits)`].
    """
    flat = codes.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % _FOLD))
    planes = []
    for width, shift in _planes(bits):
        parts = ((flat >> shift) & _ones(width)).view(8 // width, -1)
        plane = parts[0].clone()
        for i in range(1, len(parts)):
            plane |= parts[i] << (width * i)
        planes.append(plane)
    return torch.cat(planes)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes that `pack` was given: uint8 [count]."""
    size = packed.numel() // bits * _FOLD
    codes: Tensor | None = None
    start = 0
    for width, shift in _planes(bits):
        end = start + size * width // 8
        plane, start = packed[start:end], end
        parts = torch.cat([(plane >> (width * i)) & _ones(width) for i in range(8 // width)])
        codes = parts if codes is None else codes | (parts << shift)
    assert codes is not None
    return codes[:count]


def _planes(bits: int) -> list[tuple[int, int]]:
    """Widths of the planes of a code, each with the place of its lowest bit."""
    planes, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            planes.append((width, shift))
            shift += width
    return planes


def _ones(width: int) -> int:
    return (1 << width) - 1
