"""What a step sends, how long it and the run take: arithmetic at an assumed utilisation, messages beside it.

The counts are exact for the algorithms named; the times are estimates and say what they assume."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from ot_ray.model import SplitPlan
from ot_ray.training.config import TrainingConfig
from ot_ray.training.planning.flops import flops_of
from ot_ray.training.planning.hardware import Hardware
from ot_ray.training.planning.memory import REUSE_DISTANCE, WIDTHS, passes_of
from ot_ray.training.planning.parts import Parts

ASSUMED_MFU = 0.5
"""Share of the peak that arithmetic is taken to reach."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that each worker sends in one optimiser step, by rings: all-gather and reduce-scatter of S bytes
    send S (W - 1) / W, an all-reduce twice that."""

    gathered: float
    """Weights: ZeRO-3's before use, stages 1 and 2 the updated ones."""
    reduced: float
    """Gradients of E."""
    host: float
    """Between a worker and its machine's memory, both ways: what is offloaded."""

    @property
    def wire(self) -> float:
        """Between workers."""
        return self.gathered + self.reduced


@dataclass(frozen=True)
class Speed:
    """One step and the whole run; times are None where the hardware's speed is not known."""

    flops: float
    """Floating-point operations of a step, over all workers together."""
    traffic: Traffic
    compute_s: float | None
    """Seconds of arithmetic a step."""
    message_s: float | None
    """Seconds of messages a step, of which what does not fit beside the arithmetic is waited for."""
    tokens_per_s: float | None
    """Of all workers together."""
    hours: float | None
    """Of the whole run, without start, evaluation and checkpoints."""


def traffic_of(parts: Parts, training: TrainingConfig, workers: int) -> Traffic:
    """Count the messages of one optimiser step."""
    width, passes = WIDTHS[training.precision], passes_of(training, workers)[1]
    ring = (workers - 1) / workers
    learns, everything = parts.emulator * width, (parts.full + parts.emulator) * width
    host = 0.0
    if training.offload_optimizer:
        # Gradients go out once a pass, the new weights come back once.
        host += (passes + 1) * learns / workers
    if training.offload_parameters:
        host += passes * (everything + _gathered_again(parts) * width) / workers
    if training.zero_stage == 0:
        return Traffic(0.0, 2 * learns * ring, host)
    if training.zero_stage == 1:
        return Traffic(learns * ring, 2 * learns * ring, host)
    if training.zero_stage == 2:
        return Traffic(learns * ring, passes * 2 * learns * ring, host)
    once = everything + _gathered_again(parts) * width
    return Traffic(passes * once * ring, passes * learns * ring, host)


def speed_of(
    parts: Parts,
    shape: PretrainedConfig,
    split: SplitPlan,
    training: TrainingConfig,
    length: int,
    workers: int,
    hardware: Hardware,
) -> Speed:
    """Estimate a step and the run."""
    tokens = training.batch_size * length
    flops = flops_of(parts, shape, split, length) * tokens
    traffic = traffic_of(parts, training, workers)
    peak = hardware.peak(training.precision)
    if peak is None:
        return Speed(flops, traffic, None, None, None, None)
    compute = flops / (workers * peak * ASSUMED_MFU)
    messages = _seconds(traffic.wire, hardware.link(workers)) + _seconds(traffic.host, hardware.link_to_host)
    step = max(compute, messages)
    return Speed(flops, traffic, compute, messages, tokens / step, step * training.steps / 3600)


def _gathered_again(parts: Parts) -> int:
    """Weights that ZeRO-3 lets go of after the forward pass and needs again on the way back: E's and A2's, but
    for those whose next use is near (the way to the head and back). The head gives its gradient going forward."""
    return max(0, parts.emulator + parts.top - REUSE_DISTANCE // 2)


def _seconds(sent: float, bandwidth: float | None) -> float:
    return sent / bandwidth if bandwidth else 0.0
