"""How much of the hardware's arithmetic a step uses: its floating-point operations, and what a device can do at most.

How operations are counted is planning/flops.py's."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from ot_ray.model import SplitPlan
from ot_ray.training.planning.flops import flops_of
from ot_ray.training.planning.hardware import HARDWARE
from ot_ray.training.planning.parts import parts_of

_NAMES = {
    "H200": "h200",
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H100": "h100",
    "A100": "a100-80",
    "L40S": "l40s",
    "RTX A6000": "a6000",
}
"""What CUDA calls a device contains -> its entry, the first that fits; the two A100 differ in memory only."""


def step_flops(shape: PretrainedConfig, plan: SplitPlan, batch_size: int, length: int) -> float:
    """Floating-point operations of one optimiser step of distilling, over all workers together.

    Attention is counted over whole sequences, also where packed documents are masked apart: the share of the peak
    that is computed from it errs high for long sequences of short documents.

    Args:
        batch_size: sequences of a step.
        length: tokens of a sequence.
    """
    return flops_of(parts_of(shape, plan), shape, plan, length) * batch_size * length


def peak_flops(device: torch.device, precision: str = "bfloat16") -> float | None:
    """Highest FLOP/s of a device in `bfloat16` or `float32`; None where it is a CPU or not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    entry = next((entry for part, entry in _NAMES.items() if part in name), None)
    return HARDWARE[entry].peak(precision) if entry else None
