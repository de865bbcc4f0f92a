"""What the tests of worker groups run on the workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ot_ray.errors import TrainingError


def sum_of_ranks(payload: dict[str, Any]) -> dict[str, Any]:
    total = torch.tensor([float(dist.get_rank() + payload["offset"])])
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "sum": total.item()}


def our_error(payload: dict[str, Any]) -> dict[str, Any]:
    if dist.get_rank() == payload["rank"]:
        _mark(payload["seen"])
        raise TrainingError("the loss became nan at step 7; lower training.lr")
    # The others wait for it, as they do in training.
    dist.barrier()
    return {}


def foreign_error(payload: dict[str, Any]) -> dict[str, Any]:
    if dist.get_rank() == 0:
        _mark(payload["seen"])
        raise ValueError(f"not our tree: {payload['word']}")
    dist.barrier()
    return {}


def collateral_error(payload: dict[str, Any]) -> dict[str, Any]:
    """In its first life rank 1 dies, and rank 0 takes what it then sees for the user's error."""
    died = Path(payload["died"])
    second = died.exists()
    dist.barrier()
    if second:
        return {"life": 2}
    if dist.get_rank() == 1:
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError as error:
        raise TrainingError("the other worker is silent") from error
    return {"life": 1}


def _mark(path: str) -> None:
    with Path(path).open("a") as file:
        file.write("x")


def distil_and_die_once(payload: dict[str, Any]) -> dict[str, Any]:
    """Distil; the last rank kills itself, in its first life, after step `kill_at`."""
    # Here, because workers that don't distil start sooner without it.
    from ot_ray.training import DistillConfig, distill

    config = DistillConfig.model_validate(payload["distil"])
    died = Path(payload["died"])
    figures: list[dict[str, float]] = []

    def report(step: Any) -> None:
        figures.append(dict(step))
        last_rank = dist.get_rank() == dist.get_world_size() - 1
        if last_rank and step["step"] == payload["kill_at"] and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    distill(config, report)
    return {"figures": figures}
