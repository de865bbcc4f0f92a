"""A plan as aligned text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ot_ray.training.planning.hardware import GIB
from ot_ray.training.planning.memory import passes_of
from ot_ray.training.planning.speed import ASSUMED_MFU

if TYPE_CHECKING:
    from ot_ray.training.planning.plan import Plan

_WIDTH = 25
_MIB = 2**20


def sized(count: float) -> str:
    """Bytes for a person: in GiB, what is less than one in MiB."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / _MIB:,.2f} MiB"


def table_of(plan: Plan) -> str:
    """What `--plan` prints."""
    sections = (_run(plan), _parts(plan), _memory(plan), _step(plan))
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _run(plan: Plan) -> Iterable[str]:
    training = plan.training
    rows, passes = passes_of(training, plan.workers)
    yield f"Plan: {plan.shape.model_type} {plan.split} on {plan.workers} x {plan.hardware.name}"
    extras = [
        name
        for name in ("activation_checkpointing", "offload_optimizer", "offload_parameters", "compile")
        if getattr(training, name)
    ]
    yield _line("settings", ", ".join([training.precision, f"ZeRO {training.zero_stage}", *extras]))
    yield _line("batch", f"{training.batch_size} x {plan.sequence_length} tokens: {passes} x {rows} rows a worker")
    yield _line("weights to read", f"{sized(plan.stored_bytes)} " + _readers(plan))


def _readers(plan: Plan) -> str:
    return "by all workers together" if plan.training.zero_stage == 3 else "by every worker"


def _parts(plan: Plan) -> Iterable[str]:
    parts = plan.parts
    yield "Parameters"
    for name, count in (
        ("embeddings", parts.embeddings),
        ("A1", parts.bottom),
        ("M (teacher)", parts.middle),
        ("E (learns)", parts.emulator),
        ("A2", parts.top),
        ("norm and head", parts.head),
        ("full model", parts.full),
    ):
        yield _line(name, f"{count:>16,}")


def _memory(plan: Plan) -> Iterable[str]:
    memory, moments = plan.memory, plan.memory.moments
    yield _line("Memory of a worker", "".join(f"{moment.name:>14}" for moment in moments), indent="")
    for name, sizes in (
        ("teacher's weights", [memory.teacher] * len(moments)),
        ("student's weights", [memory.student] * len(moments)),
        ("gradients", [moment.gradients for moment in moments]),
        ("optimiser", [memory.optimizer] * len(moments)),
        ("activations", [moment.activations for moment in moments]),
        ("buffers", [moment.buffers for moment in moments]),
        ("together", [memory.at(moment) for moment in moments]),
    ):
        yield _line(name, "".join(f"{sized(size):>14}" for size in sizes))
    yield _line("needed", f"{sized(memory.device):>14}  ({memory.worst.name})")
    yield _line("usable", f"{sized(plan.usable_bytes):>14}  ({plan.hardware.reserve:.0%} of the device is kept free)")
    if memory.host:
        yield _line("machine's own", f"{sized(memory.host):>14}  (offloaded)")
    if memory.checkpoint:
        whose = "every worker's" if memory.writers == plan.workers else "rank 0's alone"
        yield _line("checkpoint's copy", f"{sized(memory.checkpoint):>14}  (in the machine's own memory, {whose})")


def _step(plan: Plan) -> Iterable[str]:
    speed, traffic = plan.speed, plan.speed.traffic
    yield "One step"
    yield _line("arithmetic", f"{speed.flops / 1e12:,.1f} TFLOP over all workers")
    yield _line("on the wire", f"{sized(traffic.wire)} a worker: {_sent(plan)}")
    if traffic.host:
        yield _line("to and from the host", f"{sized(traffic.host)} a worker")
    if speed.tokens_per_s is None or speed.hours is None or speed.compute_s is None or speed.message_s is None:
        yield _line("tokens/s, hours", "unknown: the peak of this hardware is not in the table")
        return
    yield _line("time", f"arithmetic {speed.compute_s:.3f} s, messages {speed.message_s:.3f} s")
    yield _line("tokens/s", f"{speed.tokens_per_s:,.0f}")
    yield _line("hours", f"{speed.hours:,.1f} for {plan.training.steps:,} steps")
    yield f"Assumed: {ASSUMED_MFU:.0%} of the peak, messages beside the arithmetic; start, evaluation and"
    yield "checkpoints, and AdamW on the host where it is offloaded, are not in it."


def _sent(plan: Plan) -> str:
    traffic = plan.speed.traffic
    return f"weights {sized(traffic.gathered)}, gradients {sized(traffic.reduced)}"


def _line(name: str, text: str, indent: str = "  ") -> str:
    return f"{indent + name:<{_WIDTH}}{text}"
