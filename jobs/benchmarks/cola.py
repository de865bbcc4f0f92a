"""What gradient learning for many customers costs: one pass for all, beside a LoRA run for each, in one run.

Each side runs in processes of its own, in turns; what happens in one is in cola_side.py, cola_memory.py
and cola_offload.py."""

from __future__ import annotations

import sys
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from jobs.benchmarks.cola_offload import OffloadConfig
from jobs.benchmarks.cola_side import Side, SideConfig
from jobs.benchmarks.shapes import Shape, shape_of
from jobs.benchmarks.sides import GIB, keep, machine, middle, require_device, require_output, run_side
from ot_ray.cola import Elsewhere
from ot_ray.config import Config

REFERENCE: Side = "LoRA"
"""What the other sides are held against."""
AIM_THROUGHPUT, AIM_GROWTH, AIM_WAIT = 3.0, 0.02, 0.10
"""Times the throughput of separate LoRA runs with 8 customers; growth of the server's memory from the fewest customers
to the most, at equal rows; share of the time that the base waits for fits. The best published figure of many tenants on
one base is 2.81 (Qwen3-4B, an H200)."""
SITES = {
    "gpt2": ("*.attn.c_attn",),
    "opt": ("*.q_proj", "*.v_proj"),
    "llama": ("*.q_proj", "*.v_proj"),
    "bloom": ("*.query_key_value",),
}
"""Maps that LoRA is commonly put on, by architecture."""


class ColaBenchmark(Config):
    """Which shapes are tuned, for how many customers, and how often that is measured."""

    shapes: list[str] = Field(default=["quickstart"], min_length=1)
    """Names of jobs/benchmarks/shapes.py."""
    sides: list[Side] = Field(default=list(get_args(Side)), min_length=1)
    """What runs."""
    customers: list[int] = Field(default=[1, 8, 32], min_length=1)
    """Who train at once."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the base is."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the base's weights."""
    rows: int = Field(default=1, ge=1)
    """Sequences of each customer in a step."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens of a sequence; unset, the shape's own."""
    rank: int = Field(default=8, ge=1)
    """Of LoRA and the auxiliaries."""
    sites: tuple[str, ...] | None = None
    """Patterns of the maps that are tuned; unset, those that LoRA is commonly put on."""
    customers_per_worker: int = Field(default=4, ge=0)
    """Customers whose fits one worker with one CPU makes; 0 fits in the base's process."""
    staleness: int = Field(default=1, ge=0)
    """Batches that the base may be ahead of the fits."""
    memory: bool = True
    """Measure the server's memory, too: the fewest and the most customers, at equal rows of a pass."""
    offload: bool = True
    """Measure where fits cost least, too, with the most customers."""
    customer_device: Elsewhere | None = None
    """Rates of a customer's device; unset, the plan has none."""
    steps: int = Field(default=5, ge=1)
    """Timed steps of one run."""
    warmup: int = Field(default=2, ge=1)
    """Steps before the clock starts."""
    repeats: int = Field(default=3, ge=1)
    """Runs of each side, in turns; the median counts."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that one run of a side may take."""
    output: str | None = None
    """A file for the result as JSON, beside standard output."""

    @model_validator(mode="after")
    def _possible(self) -> ColaBenchmark:
        if min(self.customers) < 1 or len({*self.customers}) < len(self.customers):
            raise ValueError(f"customers is {self.customers}; give numbers from 1 on, each once")
        most = max(self.customers) * self.rows
        if self.memory and any(most % count for count in (min(self.customers), max(self.customers))):
            raise ValueError(
                f"customers is {self.customers}: {most} rows of a pass cannot be dealt out to {min(self.customers)}; "
                "give numbers that divide the largest, or memory=false"
            )
        return self


def run(config: ColaBenchmark) -> dict[str, Any]:
    """Tune random models for many customers at once, by one pass for all and by a LoRA run for each, side by side."""
    require_device(config.device)
    require_output(config.output)
    shapes = {name: shape_of(name) for name in config.shapes}
    results = {name: _compare(_sized(shape, config), config) for name, shape in shapes.items()}
    print(table(results), file=sys.stderr)
    found = {
        "benchmark": "cola",
        "machine": machine(config.device),
        "settings": config.model_dump(mode="json", exclude={"output", "timeout_s"}),
        "results": results,
    }
    return keep(found, config.output)


def _sized(shape: Shape, config: ColaBenchmark) -> Shape:
    length = config.sequence_length
    return shape if length is None else shape.model_copy(update={"sequence_length": length})


def _compare(shape: Shape, config: ColaBenchmark) -> dict[str, Any]:
    runs: dict[int, dict[str, list[dict[str, Any]]]] = {
        count: {side: [] for side in config.sides} for count in config.customers
    }
    for _ in range(config.repeats):
        for count in config.customers:
            for side in config.sides:
                given = _side(side, shape, count, config.rows, config)
                runs[count][side].append(run_side("jobs.benchmarks.cola_side", given, config.timeout_s))
    names = ("tokens_per_s", "step_s", "peak_bytes", "fit_wait_share")
    throughput = {
        str(count): {side: middle(found, names) for side, found in sides.items()} for count, sides in runs.items()
    }
    return {
        "sequence_length": shape.sequence_length,
        "throughput": throughput,
        "ratios": {count: _ratios(sides) for count, sides in throughput.items()},
        "memory": _memory(shape, config) if config.memory else {},
        "offload": _offload(shape, config) if config.offload else {},
    }


def _ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Throughput as a multiple of the LoRA runs'."""
    reference = sides.get(REFERENCE, {"failed": "did not run"})
    return {
        side: found["tokens_per_s"] / reference["tokens_per_s"]
        for side, found in sides.items()
        if side != REFERENCE and "failed" not in found and "failed" not in reference
    }


def _memory(shape: Shape, config: ColaBenchmark) -> dict[str, dict[str, Any]]:
    """By side: the server's bytes with the fewest and the most customers, all passes of the same rows."""
    fewest, most = min(config.customers), max(config.customers)
    total, found = most * config.rows, {}
    for side in config.sides:
        if side != REFERENCE:
            measured = {
                count: run_side(
                    "jobs.benchmarks.cola_memory",
                    _side(side, shape, count, total // count, config),
                    config.timeout_s,
                )
                for count in dict.fromkeys((fewest, most))
            }
            found[side] = {"customers": {str(count): figures for count, figures in measured.items()}}
            if not any("failed" in figures for figures in measured.values()):
                found[side]["growth"] = measured[most]["server_bytes"] / measured[fewest]["server_bytes"] - 1
    return found


def _offload(shape: Shape, config: ColaBenchmark) -> dict[str, Any]:
    given = _side("unmerged", shape, max(config.customers), config.rows, config).model_dump()
    calibrated = OffloadConfig.model_validate({**given, "customer_device": config.customer_device})
    return run_side("jobs.benchmarks.cola_offload", calibrated, config.timeout_s)


def _side(side: Side, shape: Shape, customers: int, rows: int, config: ColaBenchmark) -> SideConfig:
    each = config.customers_per_worker
    return SideConfig(
        side=side,
        shape=shape,
        device=config.device,
        precision=config.precision,
        customers=customers,
        rows=rows,
        rank=config.rank,
        sites=config.sites or SITES[shape.model_type],
        workers=-(-customers // each) if each and side != REFERENCE else 0,
        staleness=config.staleness,
        steps=config.steps,
        warmup=config.warmup,
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as aligned text: one line a side, with its ratio to the LoRA runs, and a verdict at the end."""
    lines = []
    for name, result in results.items():
        lines.append(f"{name}, {result['sequence_length']} tokens a sequence")
        for count, sides in result["throughput"].items():
            for side, found in sides.items():
                ratio = result["ratios"][count].get(side)
                said = "" if ratio is None else f"  {ratio:6.2f} x {REFERENCE}"
                lines.append(f"  {count:>4s} customers  {side:10s} {_figures(found)}{said}")
        for side, found in result["memory"].items():
            lines.append(f"  memory  {side:10s} {_held(found)}")
        if offload := result["offload"]:
            lines += (
                offload["table"].splitlines() if "failed" not in offload else [f"  offload failed: {offload['failed']}"]
            )
        lines += _verdict(result)
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    waits = found["fit_wait_share"]
    return (
        f"{found['tokens_per_s']:10.0f} tokens/s  {found['step_s'] * 1e3:9.1f} ms a step  "
        f"{found['peak_bytes'] / GIB:7.2f} GiB" + ("" if waits is None else f"  {waits:5.1%} waiting for fits")
    )


def _held(found: dict[str, Any]) -> str:
    parts = []
    for count, figures in found["customers"].items():
        held = f"failed: {figures['failed']}" if "failed" in figures else f"{figures['server_bytes'] / GIB:.3f} GiB"
        parts.append(f"{count} customers {held}")
    return ", ".join(parts) + (f", growth {found['growth']:+.2%}" if "growth" in found else "")


def _verdict(result: dict[str, Any]) -> list[str]:
    """A line that holds throughput with 8 customers, the memory's growth and the waiting against the aims."""
    said = []
    if ratios := result["ratios"].get("8"):
        best = max(ratios, key=lambda side: ratios[side])
        said.append(_aimed(f"{best} with 8 customers {ratios[best]:.2f} x {REFERENCE}", ratios[best] >= AIM_THROUGHPUT))
    for side in ("merged", "offloaded"):
        growth = result["memory"].get(side, {}).get("growth")
        if growth is not None:
            said.append(_aimed(f"memory {side} {growth:+.2%}", growth < AIM_GROWTH))
    waits = [
        found["fit_wait_share"]
        for sides in result["throughput"].values()
        for found in sides.values()
        if found.get("fit_wait_share") is not None
    ]
    if waits:
        said.append(_aimed(f"at most {max(waits):.1%} of the time waiting for fits", max(waits) < AIM_WAIT))
    return [f"  verdict  {', '.join(said)}"] if said else []


def _aimed(figure: str, reached: bool) -> str:
    return f"{figure} ({'reaches' if reached else 'short of'} the aim)"
