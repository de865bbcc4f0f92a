"""The machines a plan can be made for: memory, speed and links, with the place each figure is from.

Arithmetic and bandwidth are the figures of the vendors' data sheets (dense, without sparsity; links in one direction),
memory about what CUDA reports, below the label's. None was checked on a card; links between nodes are assumed."""

from __future__ import annotations

import os

from pydantic import Field

from ot_ray.config import Config
from ot_ray.errors import ConfigError

GIB = 2**30


class Hardware(Config):
    """One kind of device and how its machines are wired; a worker is one device."""

    name: str
    """What the plan calls it."""
    memory_bytes: int = Field(gt=0)
    """Of one device; of the whole machine where the devices share it."""
    shared_memory: bool = False
    """Whether the workers of a machine share its memory, as processes on a CPU do."""
    reserve: float = Field(default=0.08, ge=0, lt=1)
    """Share of the memory that is kept free: CUDA and NCCL themselves, fragmentation."""
    bf16_flops: float | None = Field(default=None, gt=0)
    """Highest bfloat16 FLOP/s of one device, dense; unset, time is not estimated."""
    fp32_flops: float | None = Field(default=None, gt=0)
    """Highest float32 FLOP/s of one device without TF32."""
    memory_bandwidth: float | None = Field(default=None, gt=0)
    """Bytes/s between a device and its memory."""
    link_in_node: float | None = Field(default=None, gt=0)
    """Bytes/s that one device sends to others of its machine."""
    link_between_nodes: float | None = Field(default=None, gt=0)
    """Bytes/s that one device sends to other machines."""
    link_to_host: float | None = Field(default=None, gt=0)
    """Bytes/s between one device and its machine's memory."""
    host_memory_bytes: int | None = Field(default=None, gt=0)
    """Of one machine, for what is offloaded; unset, not checked."""
    devices_per_node: int = Field(default=8, ge=1)
    """Devices of one machine."""

    def usable_bytes(self, workers: int) -> int:
        """What one of `workers` may fill."""
        sharing = min(workers, self.devices_per_node) if self.shared_memory else 1
        return int(self.memory_bytes * (1 - self.reserve) / sharing)

    def link(self, workers: int) -> float | None:
        """The slowest link that the workers' messages cross, bytes/s."""
        return self.link_in_node if workers <= self.devices_per_node else self.link_between_nodes

    def peak(self, precision: str) -> float | None:
        """Highest FLOP/s of matrix products in `float32` or `bfloat16`."""
        return self.bf16_flops if precision == "bfloat16" else self.fp32_flops


HARDWARE: dict[str, Hardware] = {
    # NVIDIA H200 SXM data sheet: 141 GB, 989 TFLOPS BF16, 67 FP32, 4.8 TB/s, NVLink 900 GB/s both ways, PCIe 5.
    # DGX H200: 8 cards, one 400 Gb/s adapter a card.
    "h200": Hardware(
        name="NVIDIA H200",
        memory_bytes=int(139.8 * GIB),
        bf16_flops=989e12,
        fp32_flops=67e12,
        memory_bandwidth=4.8e12,
        link_in_node=450e9,
        link_between_nodes=50e9,
        link_to_host=64e9,
    ),
    # NVIDIA H100 SXM data sheet: 80 GB, 989 TFLOPS BF16, 67 FP32, 3.35 TB/s, NVLink 900 GB/s; DGX H100 as above.
    "h100": Hardware(
        name="NVIDIA H100",
        memory_bytes=int(79.1 * GIB),
        bf16_flops=989e12,
        fp32_flops=67e12,
        memory_bandwidth=3.35e12,
        link_in_node=450e9,
        link_between_nodes=50e9,
        link_to_host=64e9,
    ),
    # NVIDIA H100 PCIe data sheet: 80 GB, 756 TFLOPS BF16, 51 FP32, 2 TB/s, PCIe 5 x16; NVLink joins pairs only, so
    # PCIe counts. Between nodes: 400 Gb/s for two cards are assumed.
    "h100-pcie": Hardware(
        name="NVIDIA H100 PCIe",
        memory_bytes=int(79.1 * GIB),
        bf16_flops=756e12,
        fp32_flops=51e12,
        memory_bandwidth=2e12,
        link_in_node=64e9,
        link_between_nodes=25e9,
        link_to_host=64e9,
    ),
    # NVIDIA H100 NVL data sheet: 94 GB, 835 TFLOPS BF16, 60 FP32, 3.9 TB/s; links as above.
    "h100-nvl": Hardware(
        name="NVIDIA H100 NVL",
        memory_bytes=int(93.1 * GIB),
        bf16_flops=835e12,
        fp32_flops=60e12,
        memory_bandwidth=3.9e12,
        link_in_node=64e9,
        link_between_nodes=25e9,
        link_to_host=64e9,
    ),
    # NVIDIA A100 SXM data sheet: 80 GB, 312 TFLOPS BF16, 19.5 FP32, 2,039 GB/s, NVLink 600 GB/s, PCIe 4.
    # DGX A100: 8 cards, one 200 Gb/s adapter a card.
    "a100-80": Hardware(
        name="NVIDIA A100 80GB",
        memory_bytes=int(79.2 * GIB),
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bandwidth=2.039e12,
        link_in_node=300e9,
        link_between_nodes=25e9,
        link_to_host=32e9,
    ),
    # The same sheet: 40 GB, 1,555 GB/s.
    "a100-40": Hardware(
        name="NVIDIA A100 40GB",
        memory_bytes=int(39.4 * GIB),
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bandwidth=1.555e12,
        link_in_node=300e9,
        link_between_nodes=25e9,
        link_to_host=32e9,
    ),
    # NVIDIA L40S data sheet: 48 GB, 362 TFLOPS BF16, 91.6 FP32, 864 GB/s, PCIe 4 x16 (64 GB/s both ways), no NVLink.
    # Between nodes: 100 Gb/s a card is assumed.
    "l40s": Hardware(
        name="NVIDIA L40S",
        memory_bytes=int(44.4 * GIB),
        bf16_flops=362e12,
        fp32_flops=91.6e12,
        memory_bandwidth=864e9,
        link_in_node=32e9,
        link_between_nodes=12.5e9,
        link_to_host=32e9,
    ),
    # NVIDIA RTX A6000 data sheet: 48 GB, 309.7 TFLOPS with sparsity, so 154.8 dense, 38.7 FP32, 768 GB/s, PCIe 4 x16.
    # NVLink joins pairs only, so PCIe counts. Between nodes: 100 Gb/s a machine of 4 cards is assumed.
    "a6000": Hardware(
        name="NVIDIA RTX A6000",
        memory_bytes=int(47.4 * GIB),
        bf16_flops=154.8e12,
        fp32_flops=38.7e12,
        memory_bandwidth=768e9,
        link_in_node=32e9,
        link_between_nodes=3.1e9,
        link_to_host=32e9,
        devices_per_node=4,
    ),
}
"""By the name that a configuration uses; `cpu` is this machine."""


def hardware_of(wanted: str | Hardware) -> Hardware:
    """Look up a kind of machine by its name; a description of one's own is taken as it is.

    Raises:
        ConfigError: the name is not in the table.
    """
    if isinstance(wanted, Hardware):
        return wanted
    if wanted == "cpu":
        return _this_machine()
    if wanted not in HARDWARE:
        raise ConfigError(
            f"hardware is {wanted!r}; use one of: {', '.join([*HARDWARE, 'cpu'])}, or describe your own with name and "
            "memory_bytes"
        )
    return HARDWARE[wanted]


def _this_machine() -> Hardware:
    """The CPU: its peak is not on a data sheet in this form, so speed stays unknown rather than guessed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        name="CPU of this machine",
        memory_bytes=memory,
        shared_memory=True,
        devices_per_node=os.cpu_count() or 1,
    )
