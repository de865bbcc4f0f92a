"""Where the fits of one batch cost least, measured in a process of its own: prints JSON.

The plan itself is ot_ray.cola.offload's; here is what sends tensors to a Ray worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from jobs.benchmarks.cola_side import FIT, SideConfig, base_of, mode_of, print_alone, rows_of
from jobs.benchmarks.sides import random_batches
from ot_ray.cola import BasePass, Elsewhere, calibrate, find_sites, plan_offload
from ot_ray.cola.offload import Send
from ot_ray.launch import ray_cluster
from ot_ray.launch.shared_tensors import SharedTensor


class OffloadConfig(SideConfig):
    """What is calibrated: a side's pass, and who could fit for it."""

    customer_device: Elsewhere | None
    """The device of a customer; None leaves it out."""


def measure(config: OffloadConfig) -> dict[str, Any]:
    """Calibrate one pass; without workers, no transfer to one is measured.

    Returns:
        `measured`, `options` and the `recommended` one, as the plan has them.
    """
    device = torch.device(config.device)
    model = base_of(config, device)
    sites = find_sites(model, config.sites)
    vocabulary, count = config.shape.config().vocab_size, config.customers * config.rows
    (batch,) = random_batches(vocabulary, count, config.shape.sequence_length, 1, device)
    mode, rows = mode_of(config, sites, device), rows_of(config, batch["input_ids"])
    with _sender(config.workers) as send:
        measured = calibrate(BasePass(model, sites), mode, rows, FIT, send, config.steps)
    plan = plan_offload(measured, staleness=config.staleness, customers=config.customer_device)
    return {
        "measured": measured.model_dump(),
        "options": [asdict(option) for option in plan.options],
        "recommended": asdict(plan.recommended),
        "table": plan.table(),
    }


@contextmanager
def _sender(workers: int) -> Iterator[Send | None]:
    """What brings tensors to a worker through the object store."""
    if not workers:
        yield None
        return
    with ray_cluster(num_cpus=1, dashboard=False, show_logs=False):
        import ray

        remote: Any = ray.remote(num_cpus=1)(_received)

        def send(tensors: Mapping[str, Tensor]) -> None:
            ray.get(remote.remote([SharedTensor.of(tensor) for tensor in tensors.values()]))

        yield send


def _received(tensors: list[SharedTensor]) -> int:
    """What a worker does with them: nothing, once it has them."""
    return sum(tensor.tensor().numel() for tensor in tensors)


if __name__ == "__main__":
    print_alone(measure, OffloadConfig.model_validate_json(sys.argv[1]))
