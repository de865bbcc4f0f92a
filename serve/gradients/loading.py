"""From a configuration to a worker: the base model, where its passes come to, and the desk they are made at."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ot_ray.artifacts import load_full, open_model_source
from ot_ray.cola import BasePass, Site, find_sites
from ot_ray.errors import UnsupportedModelError
from ot_ray.model import FAMILIES
from ot_ray.model.distill import body_output
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.gradients.desk import Desk
from serve.gradients.residents import Residents
from serve.settings.engine import EngineConfig
from serve.settings.gradients import GradientsConfig


def load_desk(config: EngineConfig, settings: GradientsConfig, catalogue: Catalogue, store: Store) -> Desk:
    """Load the base model, and see which of its sites a pass comes to.

    Raises:
        ConfigError: there is no model at `model.source`, or its tokenizer is another model's.
        ArtifactError: a file of its weights is missing, truncated or corrupt.
        UnsupportedModelError: it is no language model.
        SiteError: a pattern of `settings.sites` matches no map of it.
    """
    source = open_model_source(config.model)
    if FAMILIES[source.config.model_type].task != "text":
        raise UnsupportedModelError(
            f"model.source is {source.files.where!r}, of type {source.config.model_type}, which takes images; gradient "
            "learning serves language models; leave gradients out"
        )
    device = torch.device("cuda" if settings.num_gpus else "cpu")
    model = load_full(config.model, source=source).to(device)  # type: ignore[arg-type]
    base = BasePass(model, find_sites(model, settings.sites), device="cpu")
    return Desk(
        catalogue=catalogue,
        store=store,
        model_name=config.model.name,
        base=base,
        tokenizer=source.tokenizer(),
        settings=settings,
        residents=Residents(store, device, settings.cached_bytes),
        reached=reached_sites(model, base.sites),
    )


@torch.no_grad()
def reached_sites(model: PreTrainedModel, sites: dict[str, Site]) -> frozenset[str]:
    """The sites that a pass calls with its rows: not the head, which passes go round, nor a table of positions, which
    is the same for all rows."""
    reached: set[str] = set()

    def called(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.shape[0] % 2 == 0:
            reached.add(name)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(called, name), with_kwargs=True) for name in sites
    ]
    try:
        body_output(model, torch.zeros(2, 3, dtype=torch.int64, device=model.device), None)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(reached)
