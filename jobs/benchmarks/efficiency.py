"""What tuning costs: full fine-tuning, LoRA, offsite tuning and both, of one model in one run (the paper's Table 6).

Each side runs in processes of its own, in turns; what happens in one is in efficiency_side.py."""

from __future__ import annotations

import math
import sys
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from jobs.benchmarks.efficiency_side import Side, SideConfig
from jobs.benchmarks.shapes import Shape, shape_of
from jobs.benchmarks.sides import GIB, keep, machine, middle, require_device, require_output, run_side
from ot_ray.config import Config
from ot_ray.model import LoraSettings

REFERENCE: Side = "FT"
"""What the other sides are held against."""
PAPER, AIM = (6.5, 5.6), (8.0, 6.0)
"""How many times the speed of full fine-tuning offsite tuning with LoRA has, and into how small a part of its memory
it fits: in the paper's Table 6 (GPT2-XL), and as this project wants it."""


class EfficiencyBenchmark(Config):
    """Which shapes are tuned, with which batches, and how often that is measured."""

    shapes: list[str] = Field(default=["opt-small"], min_length=1)
    """Names of jobs/benchmarks/shapes.py; the paper's are gpt2-xl and opt-1.3b."""
    sides: list[Side] = Field(default=list(get_args(Side)), min_length=1)
    """What runs."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of matrix products, on every side."""
    batch_sizes: list[int | Literal["largest"]] = Field(default=[1], min_length=1)
    """Sequences a step; `largest` doubles them for each side until its memory is full (on a GPU alone)."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens of a sequence; unset, the shape's own."""
    lora: LoraSettings = LoraSettings()
    """For the LoRA sides."""
    compile: bool = False
    """Run the layers through `torch.compile`, on every side."""
    steps: int = Field(default=5, ge=1)
    """Timed steps of one run."""
    warmup: int = Field(default=2, ge=1)
    """Steps before the clock starts."""
    repeats: int = Field(default=3, ge=1)
    """Runs of each side, in turns; the median counts."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that one run of a side may take."""
    output: str | None = None
    """A file for the result as JSON, beside standard output; `jobs.study` shows it as Table 6."""

    @model_validator(mode="after")
    def _possible(self) -> EfficiencyBenchmark:
        sizes = [size for size in self.batch_sizes if size != "largest"]
        if any(size < 1 for size in sizes):
            raise ValueError(f"batch_sizes is {self.batch_sizes}; each is 1 or more, or largest")
        if self.device == "cpu" and "largest" in self.batch_sizes:
            raise ValueError("batch_sizes names largest, but a CPU's memory has no hard end; give numbers")
        return self


def run(config: EfficiencyBenchmark) -> dict[str, Any]:
    """Tune random models of published shapes in full, by LoRA, offsite, and by Transformers' Trainer, side by side."""
    require_device(config.device)
    require_output(config.output)
    shapes = {name: shape_of(name) for name in config.shapes}
    results = {
        f"{name}, batch {size}": _compare(_sized(shape, config), size, config)
        for name, shape in shapes.items()
        for size in config.batch_sizes
    }
    print(table(results), file=sys.stderr)
    found = {
        "benchmark": "efficiency",
        "machine": machine(config.device),
        "precision": config.precision,
        "compile": config.compile,
        "results": results,
    }
    return keep(found, config.output)


def _sized(shape: Shape, config: EfficiencyBenchmark) -> Shape:
    length = config.sequence_length
    return shape if length is None else shape.model_copy(update={"sequence_length": length})


def _compare(shape: Shape, size: int | Literal["largest"], config: EfficiencyBenchmark) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in config.sides}
    sizes = {side: _largest(side, shape, config) if size == "largest" else size for side in config.sides}
    for _ in range(config.repeats):
        for side in config.sides:
            runs[side].append({"batch_size": sizes[side], **_run_side(side, shape, sizes[side], config)})
    sides = {side: middle(found, ("tokens_per_s", "peak_bytes")) for side, found in runs.items()}
    return {
        "split": str(shape.split),
        "sequence_length": shape.sequence_length,
        "sides": sides,
        "ratios": {side: _ratio(found, sides[REFERENCE]) for side, found in sides.items()}
        if REFERENCE in sides
        else {},
    }


def _largest(side: Side, shape: Shape, config: EfficiencyBenchmark) -> int:
    """The largest power of two of sequences that this side can step on; 1 where not even that fits."""
    size = 1
    short = config.model_copy(update={"steps": 1, "warmup": 1})
    while "failed" not in _run_side(side, shape, size * 2, short):
        size *= 2
    return size


def _run_side(side: Side, shape: Shape, batch_size: int, config: EfficiencyBenchmark) -> dict[str, Any]:
    given = SideConfig(
        side=side,
        shape=shape.model_copy(update={"batch_size": batch_size}),
        device=config.device,
        precision=config.precision,
        steps=config.steps,
        warmup=config.warmup,
        lora=config.lora,
        compile=config.compile,
    )
    return run_side("jobs.benchmarks.efficiency_side", given, config.timeout_s)


def _ratio(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float] | None:
    if "failed" in found or "failed" in reference:
        return None
    return {
        "speed": found["tokens_per_s"] / reference["tokens_per_s"],
        "memory": found["peak_bytes"] / reference["peak_bytes"],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as aligned text: one line a side, with its ratios to full fine-tuning, and a verdict at the end."""
    lines = []
    for name, result in results.items():
        lines.append(f"{name}, split {result['split']}, {result['sequence_length']} tokens a sequence")
        lines += [
            f"  {side:8s} {_figures(found)}{_ratios(result['ratios'].get(side))}"
            for side, found in result["sides"].items()
        ]
        lines += _verdict(result["ratios"])
    return "\n".join(lines)


def _verdict(ratios: dict[str, dict[str, float] | None]) -> list[str]:
    """A line that holds the ratios against the paper's and the aim; none where those sides did not run or failed."""
    said = []
    tuned, trainer = ratios.get("OT+LoRA"), ratios.get("Trainer")
    if tuned is not None:
        speed, memory = tuned["speed"], _inverse(tuned["memory"])
        said.append(f"OT+LoRA has {speed:.1f} x the speed of {REFERENCE} ({_held(speed, PAPER[0], AIM[0])})")
        said.append(f"1/{memory:.1f} of its memory ({_held(memory, PAPER[1], AIM[1], '1/')})")
    if trainer is not None:
        said.append(
            f"{REFERENCE} has {_inverse(trainer['speed']):.2f} x the speed and {_inverse(trainer['memory']):.2f} x the "
            "memory of Trainer"
        )
    return [f"  verdict  {', '.join(said)}"] if said else []


def _held(found: float, paper: float, aim: float, unit: str = "") -> str:
    place = "reaches the aim" if found >= aim else "reaches the paper's" if found >= paper else "short of the paper's"
    return f"{place}; paper {unit}{paper:g}, aim {unit}{aim:g}"


def _inverse(ratio: float) -> float:
    return 1 / ratio if ratio else math.inf


def _figures(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    return (
        f"{found['tokens_per_s']:10.0f} tokens/s  {found['peak_bytes'] / GIB:7.2f} GiB  "
        f"{found['trainable_parameters']:13,d} trainable  batch {found['batch_size']:<4d}"
    )


def _ratios(found: dict[str, float] | None) -> str:
    return "" if found is None else f"  {found['speed']:6.2f} x speed, {found['memory']:5.2f} x memory of {REFERENCE}"
