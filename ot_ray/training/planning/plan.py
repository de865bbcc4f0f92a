"""The plan of a distillation: what it needs and how long it takes, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PretrainedConfig

from ot_ray.errors import UnsupportedModelError
from ot_ray.model import IMAGE_FAMILIES, SplitPlan, check_supported
from ot_ray.training.config import TrainingConfig
from ot_ray.training.planning.activations import Activations, activations_of
from ot_ray.training.planning.alternatives import MOST_WORKERS, alternatives
from ot_ray.training.planning.hardware import Hardware
from ot_ray.training.planning.memory import Memory, memory_of, passes_of
from ot_ray.training.planning.parts import Parts, parts_of
from ot_ray.training.planning.speed import Speed, speed_of
from ot_ray.training.planning.table import sized, table_of

Measure = Callable[[TrainingConfig, int], Memory]


@dataclass(frozen=True)
class Plan:
    """What one way to run a distillation needs."""

    shape: PretrainedConfig
    split: SplitPlan
    training: TrainingConfig
    sequence_length: int
    workers: int
    hardware: Hardware
    stored_bytes: int
    """Of the full model's weights as they are stored; each is read once by ZeRO-3's workers together, by every
    worker otherwise."""
    parts: Parts
    memory: Memory
    speed: Speed
    memory_by: Measure
    """The same run with other settings and another number of workers."""

    @property
    def usable_bytes(self) -> int:
        """What a worker may fill of its device."""
        return self.hardware.usable_bytes(self.workers)

    def fits(self) -> bool:
        """Whether nothing stands against the plan."""
        return _short(self.memory, self.hardware, self.workers) is None

    def table(self) -> str:
        """The plan as aligned text, for a person."""
        return table_of(self)

    def problems(self) -> list[str]:
        """Why the plan cannot run, each with what would; empty where it can."""
        short = _short(self.memory, self.hardware, self.workers)
        return [] if short is None else [f"{short}; {self._way_out()}"]

    def _way_out(self) -> str:
        for name, training, workers in alternatives(self.training, self.workers):
            # Tracing a pass takes seconds, and is not needed where the rest is too much already.
            least = memory_of(self.parts, training, workers, Activations(0, 0, 0))
            if _short(least, self.hardware, workers) is not None:
                continue
            memory = self.memory_by(training, workers)
            if _short(memory, self.hardware, workers) is None:
                return f"it fits with {name} ({sized(memory.device)} a worker)"
        return (
            f"nothing that does not change the losses makes it fit, up to {MOST_WORKERS} workers with all offloaded; "
            "use larger devices, a smaller split.keep or a shorter sequence_length"
        )


def plan_distillation(
    shape: PretrainedConfig,
    split: SplitPlan,
    training: TrainingConfig,
    sequence_length: int,
    workers: int,
    hardware: Hardware,
    dtype: torch.dtype,
) -> Plan:
    """Plan a distillation from the model's configuration alone.

    Args:
        shape: the model's `config.json`, as Transformers reads it.
        sequence_length: tokens of a sequence.
        workers: one a device.
        dtype: of the weights as they are stored.

    Raises:
        ConfigError: there are fewer rows in a batch than workers.
        UnsupportedModelError: the architecture is not in the families' table, or is of images.
        SplitError: the split does not fit the model.
    """
    check_supported(shape.model_type)
    if shape.model_type in IMAGE_FAMILIES:
        raise UnsupportedModelError(
            f"model_type is {shape.model_type!r}: plans are of language models; leave out --plan, and distil an image "
            "model without one"
        )
    passes_of(training, workers)
    parts = parts_of(shape, split)

    @cache
    def traced(rows: int, precision: str, checkpointing: bool) -> Activations:
        return activations_of(shape, split, rows, sequence_length, getattr(torch, precision), checkpointing)

    def memory_by(settings: TrainingConfig, count: int) -> Memory:
        rows, _ = passes_of(settings, count)
        activations = traced(rows, settings.precision, settings.activation_checkpointing)
        return memory_of(parts, settings, count, activations)

    return Plan(
        shape=shape,
        split=split,
        training=training,
        sequence_length=sequence_length,
        workers=workers,
        hardware=hardware,
        stored_bytes=parts.full * dtype.itemsize,
        parts=parts,
        memory=memory_by(training, workers),
        speed=speed_of(parts, shape, split, training, sequence_length, workers, hardware),
        memory_by=memory_by,
    )


def _short(memory: Memory, hardware: Hardware, workers: int) -> str | None:
    """What does not fit, in words."""
    usable, needed = hardware.usable_bytes(workers), memory.device
    on_node = min(workers, hardware.devices_per_node)
    host = memory.machine(on_node)
    if hardware.shared_memory:
        # What is offloaded, and a checkpoint's copy, lie in the same memory.
        needed += -(-host // on_node)
    if needed > usable:
        return (
            f"a worker needs {sized(needed)}, but {hardware.name} leaves it {sized(usable)}: "
            f"{sized(needed - usable)} short"
        )
    if hardware.host_memory_bytes is not None and host > hardware.host_memory_bytes:
        return (
            f"a machine needs {sized(host)} of its own memory for what is offloaded and a checkpoint's copy, but has "
            f"{sized(hardware.host_memory_bytes)}"
        )
    return None
