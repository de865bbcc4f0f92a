"""`python -m jobs.benchmark <name> key=value ...`: measure what this library promises, against the plain way.

A benchmark is a module of jobs/benchmarks; results that were kept are in docs/experiments.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jobs.benchmarks import cola, distill, efficiency, serving
from jobs.command import run_command
from ot_ray.config import Config

BENCHMARKS: dict[str, tuple[type[Config], Callable[[Any], dict[str, Any]]]] = {
    "cola": (cola.ColaBenchmark, cola.run),
    "distill": (distill.DistillBenchmark, distill.run),
    "efficiency": (efficiency.EfficiencyBenchmark, efficiency.run),
    "serve": (serving.ServingBenchmark, serving.run),
}


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark that the first argument names with the rest as its settings."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__, add_help=False)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    name = parser.parse_args(arguments[:1]).name
    cls, run = BENCHMARKS[name]
    run_command(f"benchmark {name}", cls, run, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
