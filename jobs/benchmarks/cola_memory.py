"""What the server's device holds during one pass for some customers, in a process of its own: prints JSON.

On a CPU, which has no allocator of its own to ask, weights and auxiliaries are counted and the pass is traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from jobs.benchmarks.cola_side import SideConfig, base_of, mode_of, print_alone, rows_of
from jobs.benchmarks.sides import random_batches
from ot_ray.cola import BasePass, Merging, find_sites


def measure(config: SideConfig) -> dict[str, Any]:
    """A pass of `rows * customers` sequences, whose pairs go to the host's memory as they arise.

    Returns:
        `server_bytes`: the most that the base's device held; `host_bytes`: auxiliaries that the host holds for it.
    """
    device = torch.device(config.device)
    model = base_of(config, device)
    sites = find_sites(model, config.sites)
    mode = mode_of(config, sites, device)
    vocabulary, count = config.shape.config().vocab_size, config.customers * config.rows
    (batch,) = random_batches(vocabulary, count, config.shape.sequence_length, 1, device)
    rows, base, merged = rows_of(config, batch["input_ids"]), BasePass(model, sites, "cpu"), config.side == "merged"
    with ExitStack() as stack:
        merging = stack.enter_context(Merging(model, sites)) if merged else None

        def step() -> None:
            if merging is not None:
                merging.merge(mode.summands())
            base(rows, mode, merged)

        step()
        held = sum(tensor.nbytes for auxiliary in mode.auxiliaries.values() for tensor in auxiliary.tensors.values())
        here = held if config.side == "unmerged" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            server = torch.cuda.max_memory_allocated(device)
        else:
            clean = sum(model.get_parameter(f"{name}.weight").nbytes for name in sites) if merged else 0
            weights = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
            server = weights + clean + here + allocated(step)
    return {"server_bytes": server, "host_bytes": held - here}


def allocated(call: Callable[[], object]) -> int:
    """The most that a call holds of the CPU's memory at once, in tensors that it makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        call()
    # Its own summary tells what operators allocate, not what is held at once.
    results: Any = traced.profiler.kineto_results if traced.profiler is not None else None
    held = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    print_alone(measure, SideConfig.model_validate_json(sys.argv[1]))
