"""Which layers of the middle an emulator keeps. Distilling them is in distill.py."""

from __future__ import annotations

from ot_ray.errors import SplitError


def uniform_layers(middle: int, keep: int) -> list[int]:
    """Choose `keep` of `middle` layers at even distances, the first and the last always among them.

    Uniform layer drop of the Offsite-Tuning paper (section 3.3): ``round(i (M - 1) / (k - 1))`` for
    i = 0..k-1. A single layer is taken from the centre.

    Returns:
        Positions within the middle, ascending, counted from 0.

    Raises:
        SplitError: `keep` is not in 1..`middle`.
    """
    if not 1 <= keep <= middle:
        raise SplitError(f"split.keep is {keep}, but only {middle} layers lie between the adapters; use 1..{middle}")
    if keep == 1:
        return [(middle - 1) // 2]
    return [round(i * (middle - 1) / (keep - 1)) for i in range(keep)]
