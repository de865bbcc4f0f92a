"""Distilling in one pass against the plain way of two Transformers models: speed, memory, equal losses.

Each side runs in processes of its own, in turns; what happens in one is in distill_side.py."""

from __future__ import annotations

import sys
from typing import Any, Literal, get_args

import torch
from pydantic import Field

from jobs.benchmarks.distill_side import Side, SideConfig
from jobs.benchmarks.shapes import Shape, shape_of
from jobs.benchmarks.sides import GIB, keep, machine, middle, require_device, require_output, run_side
from ot_ray.config import Config
from ot_ray.model import DistillOptions
from ot_ray.training import TrainingConfig
from ot_ray.training.planning import hardware_of, plan_distillation

PAIRS = [
    ("plain-float32", "ours-float32"),
    ("plain-bfloat16", "ours-bfloat16"),
    ("plain-float32", "ours-bfloat16"),
]
"""What is held against what; ours in float32 beside plain bfloat16 would say nothing."""


class DistillBenchmark(Config):
    """Which shapes are distilled, how, and how often that is measured."""

    shapes: list[str] = Field(default=["opt-small"], min_length=1)
    """Names of jobs/benchmarks/shapes.py: opt-small, gpt2-xl, opt-1.3b, opt-6.7b, bloom-7.1b, llama-7b."""
    sides: list[Side] = Field(default=list(get_args(Side)), min_length=1)
    """What runs: the plain way or ours, with matrix products in float32 or bfloat16."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences a step; unset, the shape's own."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens of a sequence; unset, the shape's own."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences a pass, on our side; unset, the whole batch."""
    steps: int = Field(default=3, ge=1)
    """Timed steps of one run."""
    warmup: int = Field(default=1, ge=0)
    """Steps before the clock starts."""
    repeats: int = Field(default=3, ge=1)
    """Runs of each side, in turns; the median counts."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that one run of a side may take."""
    options: DistillOptions = DistillOptions(head_tokens=256)
    """How our pass is computed."""
    hardware: str = "cpu"
    """Whose speed the plan beside the measurement takes, by its name in the planner (`h200`)."""
    output: str | None = None
    """A file for the result as JSON, beside standard output."""


def run(config: DistillBenchmark) -> dict[str, Any]:
    """Distil random models of published shapes the plain way and in one pass, side by side."""
    require_device(config.device)
    require_output(config.output)
    shapes = {name: _sized(shape_of(name), config) for name in config.shapes}
    results = {name: _compare(shape, config) for name, shape in shapes.items()}
    print(table(results), file=sys.stderr)
    return keep({"benchmark": "distill", "machine": machine(config.device), "results": results}, config.output)


def _sized(shape: Shape, config: DistillBenchmark) -> Shape:
    given = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    return shape.model_copy(update={name: value for name, value in given.items() if value is not None})


def _compare(shape: Shape, config: DistillBenchmark) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in config.sides}
    for _ in range(config.repeats):
        for side in config.sides:
            runs[side].append(_run_side(side, shape, config))
    names = ("tokens_per_s", "flops_per_s", "mfu", "peak_bytes")
    sides = {side: middle(found, names) for side, found in runs.items()}
    return {
        "split": str(shape.split),
        "batch_size": shape.batch_size,
        "sequence_length": shape.sequence_length,
        "plan": _plan(shape, config),
        "sides": sides,
        "comparisons": [_against(*pair, sides) for pair in PAIRS if set(pair) <= sides.keys()],
    }


def _plan(shape: Shape, config: DistillBenchmark) -> dict[str, Any]:
    """What the planner expects of one DeepSpeed worker without sharding, in bfloat16."""
    training = TrainingConfig(
        steps=1,
        batch_size=shape.batch_size,
        micro_batch_size=config.micro_batch_size,
        precision="bfloat16",
        activation_checkpointing=config.options.checkpointing,
    )
    hardware = hardware_of(config.hardware)
    length = shape.sequence_length
    plan = plan_distillation(shape.config(), shape.split, training, length, 1, hardware, torch.bfloat16)
    return {"peak_bytes": plan.memory.device, "tokens_per_s": plan.speed.tokens_per_s, "hardware": hardware.name}


def _run_side(side: Side, shape: Shape, config: DistillBenchmark) -> dict[str, Any]:
    given = SideConfig(
        side=side,
        shape=shape,
        device=config.device,
        steps=config.steps,
        warmup=config.warmup,
        options=config.options,
        micro_batch_size=config.micro_batch_size,
    )
    return run_side("jobs.benchmarks.distill_side", given, config.timeout_s)


def _against(plain: str, ours: str, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    a, b = sides[plain], sides[ours]
    if "failed" in a or "failed" in b:
        return {"plain": plain, "ours": ours, "speed": None, "memory": None, "loss_difference": None}
    pairs = zip(a["losses"], b["losses"], strict=True)
    return {
        "plain": plain,
        "ours": ours,
        "speed": b["tokens_per_s"] / a["tokens_per_s"],
        "memory": b["peak_bytes"] / a["peak_bytes"],
        "loss_difference": max(abs(y[name] / x[name] - 1) for x, y in pairs for name in ("loss", "lm_loss", "kd_loss")),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as aligned text: one line a side, then one a comparison."""
    lines = []
    for name, result in results.items():
        lines.append(f"{name} {result['split']}, batch {result['batch_size']} x {result['sequence_length']} tokens")
        lines += [f"  {side:15s} {_figures(found)}" for side, found in result["sides"].items()]
        lines += [f"  {'plan':15s} {_planned(result['plan'])}"]
        lines += [f"  {c['ours']} against {c['plain']}: {_ratios(c)}" for c in result["comparisons"]]
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    mfu = f"{found['mfu']:.1%} MFU" if found["mfu"] is not None else f"{found['flops_per_s'] / 1e9:.0f} GFLOP/s"
    last = found["losses"][-1]["loss"]
    return f"{found['tokens_per_s']:10.0f} tokens/s  {found['peak_bytes'] / GIB:7.2f} GiB  {mfu}  last loss {last:.5f}"


def _planned(plan: dict[str, Any]) -> str:
    speed = f"{plan['tokens_per_s']:10.0f}" if plan["tokens_per_s"] is not None else f"{'unknown':>10s}"
    return f"{speed} tokens/s  {plan['peak_bytes'] / GIB:7.2f} GiB  one DeepSpeed worker, bfloat16, {plan['hardware']}"


def _ratios(found: dict[str, Any]) -> str:
    if found["speed"] is None:
        return "one of them failed"
    return (
        f"{found['speed']:.2f} x tokens/s, {found['memory']:.2f} x memory, "
        f"losses differ by {found['loss_difference']:.1e} at most"
    )
