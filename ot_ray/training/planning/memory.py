"""What one worker's device and machine must hold, by kind, for a precision, a ZeRO stage and offloading.

It follows what DeepSpeed 0.19 keeps, with the settings of deepspeed_settings.py; tests compare it with live runs."""

from __future__ import annotations

from dataclasses import dataclass

from ot_ray.data.batches import rows_of
from ot_ray.training.config import TrainingConfig
from ot_ray.training.deepspeed_settings import BUCKET
from ot_ray.training.planning.activations import Activations
from ot_ray.training.planning.parts import Parts

LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 holds gathered at once at most: DeepSpeed's `stage3_max_live_parameters`."""
REUSE_DISTANCE = 1_000_000_000
"""Parameters used in between up to which ZeRO-3 keeps one gathered: DeepSpeed's `stage3_max_reuse_distance`."""
WIDTHS = {"float32": 4, "bfloat16": 2}
"""Bytes of a weight in its working copy."""


@dataclass(frozen=True)
class Moment:
    """Bytes that come and go within a step, when they are most in one of its parts."""

    name: str
    """`forward`, `backward` or `step`, the optimiser's."""
    gradients: int
    """Of E."""
    activations: int
    """Of one micro-batch, the head's logits among them."""
    buffers: int
    """Weights gathered for use, messages under way, and copies within the optimiser's step."""

    @property
    def total(self) -> int:
        """All kinds together."""
        return self.gradients + self.activations + self.buffers


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker's device: what stays, and what comes and goes within a step."""

    teacher: int
    """M: only forward, frozen."""
    student: int
    """E, and what it shares with the full model: A1, A2, embeddings, norm and head."""
    optimizer: int
    """AdamW's two moments of E, and its float32 masters where they are not the working copy."""
    moments: tuple[Moment, ...]
    """The parts of a step, in their order."""
    host: int
    """In the machine's own memory, for this worker: what is offloaded."""
    checkpoint: int
    """In the machine's own memory, for each worker that has one: the copy of a checkpoint while it is written."""
    writers: int
    """How many workers have such a copy: without sharding rank 0 alone."""

    @property
    def worst(self) -> Moment:
        """When the device holds most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def device(self) -> int:
        """What the device must hold, at the worst moment."""
        return self.at(self.worst)

    def machine(self, workers: int) -> int:
        """What a machine must hold in its own memory for this many workers, rank 0 among them."""
        return self.host * workers + self.checkpoint * min(self.writers, workers)

    def at(self, moment: Moment) -> int:
        """What the device holds at a moment."""
        return self.teacher + self.student + self.optimizer + moment.total


def passes_of(training: TrainingConfig, workers: int) -> tuple[int, int]:
    """Sequences of the largest micro-batch, and how many of them a step has on each worker.

    Raises:
        ConfigError: there are fewer rows in a batch than workers.
    """
    share = len(rows_of(training.batch_size, 0, workers))
    rows = min(training.micro_batch_size or share, share)
    return rows, -(-share // rows)


def memory_of(parts: Parts, training: TrainingConfig, workers: int, activations: Activations) -> Memory:
    """Add up what a worker holds at the worst moment of a step.

    Args:
        activations: of its largest micro-batch.
    """
    width = WIDTHS[training.precision]
    shards = workers if training.zero_stage == 3 else 1
    teacher = -(-parts.middle // shards) * width
    student = -(-(parts.full - parts.middle + parts.emulator) // shards) * width
    optimizer = _optimizer_bytes(parts, training, workers)
    passes = passes_of(training, workers)[1]
    moments = _moments(parts, training, workers, passes, activations)
    host = 0
    if training.offload_optimizer:
        # Beside the state stand the gradients, in float32, and the new weights on their way back.
        host += optimizer + -(-parts.emulator // workers) * (4 + width)
        optimizer = 0
    if training.offload_parameters:
        host += teacher + student
        teacher = student = 0
    writers = workers if training.zero_stage else 1
    # The float32 masters and AdamW's two moments.
    checkpoint = -(-parts.emulator // writers) * 12 if training.checkpoint_every else 0
    return Memory(teacher, student, optimizer, moments, host, checkpoint, writers)


def _optimizer_bytes(parts: Parts, training: TrainingConfig, workers: int) -> int:
    shards = workers if training.zero_stage else 1
    # ZeRO keeps masters even of weights that are float32 already.
    masters = 4 if training.precision == "bfloat16" or training.zero_stage else 0
    return -(-parts.emulator // shards) * (8 + masters)


def _moments(
    parts: Parts, training: TrainingConfig, workers: int, passes: int, activations: Activations
) -> tuple[Moment, ...]:
    width, stage = WIDTHS[training.precision], training.zero_stage
    whole, share = parts.emulator, -(-parts.emulator // workers)
    messages = BUCKET * width
    if stage == 0:
        copies = 4 * whole if training.precision == "bfloat16" else 0
        return (
            Moment("forward", whole * width if passes > 1 else 0, activations.forward, 0),
            _backward(whole * width, passes, activations, 0),
            Moment("step", whole * width, 0, copies),
        )
    if stage == 1:
        return (
            Moment("forward", whole * width if passes > 1 else 0, activations.forward, 0),
            _backward(whole * width, passes, activations, messages),
            Moment("step", share * width, 0, share * (8 - width)),
        )
    if stage == 2:
        kept = share * width if passes > 1 else 0
        return (
            Moment("forward", kept, activations.forward, 0),
            Moment("backward", kept + share * width, activations.backward, messages),
            Moment("step", share * width, 0, share * (8 - width)),
        )
    # What is used again on the way back stays gathered; beside it stand what is fetched ahead and gradients
    # under way, as they are sent and as they arrive.
    used_again = min(parts.emulator + parts.top + parts.output, LIVE_PARAMETERS)
    ahead = min(BUCKET, parts.full + parts.emulator - used_again)
    gathered = (used_again + ahead) * width
    scattered = 2 * min(BUCKET, whole) * width
    copies = share * (4 if training.precision == "float32" else 4 + width)
    return (
        Moment("forward", share * width, activations.forward, messages + gathered),
        Moment("backward", share * width, activations.backward, messages + gathered + scattered),
        Moment("step", share * width, 0, messages + copies),
    )


def _backward(gradients: int, passes: int, activations: Activations, buffers: int) -> Moment:
    """Where gradients stay whole: in the first of several passes they come as the activations go."""
    if passes > 1:
        return Moment("backward", gradients, activations.backward, buffers)
    # All that exceeds the gradients of E at that moment is activations.
    return Moment("backward", gradients, max(0, activations.backward_with_gradients - gradients), buffers)
