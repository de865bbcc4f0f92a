"""What the test of gradient learning by a worker group runs on the workers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ot_ray.artifacts import open_model_source
from ot_ray.cola import Auxiliary, AuxiliaryConfig, Collaboration, CustomerRows, FitConfig, Mode, Site
from ot_ray.model import ModelConfig
from ot_ray.store import open_store
from ot_ray.training import GradientCheckpoints, GradientRun
from tests.fixtures.models import VOCAB

SITES = "*.q_proj"
RUN = GradientRun(steps=4, staleness=1, checkpoint_every=2)
FITTING = FitConfig(lr=1e-2)


class Rows:
    """Three rows: of two ranks, the first has both of ann's."""

    def __getitem__(self, number: int) -> CustomerRows:
        ids = torch.randint(2, VOCAB, (3, 10), generator=torch.Generator().manual_seed(number))
        return CustomerRows(ids, ("ann", "ann", "bob"), ids.clone())


def mode_of(sites: dict[str, Site]) -> tuple[Mode, dict[str, Auxiliary]]:
    start = {name: Auxiliary(sites, AuxiliaryConfig(rank=2, seed=ord(name[0]))) for name in ("ann", "bob")}
    return Collaboration({name: one.copy() for name, one in start.items()}), start


def learn_in_a_group(payload: dict[str, Any]) -> dict[str, Any]:
    """Learn with sharded weights; rank 0 has a pool of one worker, and leaves what was learnt in a file."""
    from ot_ray.launch import AuxiliaryPool
    from ot_ray.training.gradient_workers import learn_together, open_sharded_base

    torch.set_num_threads(1)
    folder = Path(payload["folder"])
    with contextlib.closing(open_model_source(ModelConfig(name="tiny", source=str(folder / "model")))) as source:
        base = open_sharded_base(source, "float32", SITES)
        mode, start = mode_of(base.sites)
        result, states = learn_together(
            base,
            mode,
            Rows(),
            lambda: AuxiliaryPool(start, FITTING),
            RUN,
            checkpoints=lambda: GradientCheckpoints(open_store(str(folder / "store")), "run", {}),
            evaluate=lambda: {"validation": base.losses(Rows()[99], mode)[0]["bob"]},
        )
    told = {"history": result.history, "evaluations": result.evaluations}
    torch.save({"tensors": tensors_of(mode), "states": states, **told}, folder / f"rank-{dist.get_rank()}.pt")
    return {"rank": dist.get_rank(), "workers": dist.get_world_size()}


def tensors_of(mode: Mode) -> dict[str, dict[str, Tensor]]:
    return {name: dict(auxiliary.tensors) for name, auxiliary in mode.auxiliaries.items()}
