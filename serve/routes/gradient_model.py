"""What the HTTP side knows of the base model for gradient learning: its maps by name, its vocabulary, its context.

The weights are the workers'; nothing here takes the memory of one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fastapi import Request
from torch import nn
from transformers import PreTrainedModel

from ot_ray.artifacts import open_model_source
from ot_ray.cola import Site, find_sites
from ot_ray.errors import SiteError
from ot_ray.model import ModelConfig, empty_model
from serve.engine.checks import context_length
from serve.failures import ApiError
from serve.routes import service_of

_making = threading.Lock()


@dataclass(frozen=True)
class GradientModel:
    """A language model without its weights."""

    skeleton: nn.Module
    """The maps that can be sites, under their names, and no other module that could be one."""
    sites: dict[str, Site]
    vocabulary: int
    """Tokens that it knows."""
    context: int
    """Tokens of its longest row."""

    def matching(self, patterns: Sequence[str]) -> dict[str, Site]:
        """The sites that patterns name.

        Raises:
            ApiError: a pattern matches none; the nearest names are told.
        """
        try:
            return find_sites(self.skeleton, patterns)
        except SiteError as error:
            raise ApiError(f"{error}.", code="site_not_found", param="sites") from None


def read_model(config: ModelConfig, offered: Sequence[str] = ("*",)) -> GradientModel:
    """Read a model's shape.

    Args:
        offered: patterns of the maps that may be sites; others are as if they were none.

    Raises:
        ConfigError: there is none at `model.source`.
        SiteError: a pattern matches no map.
    """
    shape = open_model_source(config).config
    model = empty_model(shape, torch.float32)
    sites = find_sites(_without_unreached(model), offered)
    for name in find_sites(model, "*").keys() - sites.keys():
        parent, _, own = name.rpartition(".")
        delattr(model.get_submodule(parent), own)
    return GradientModel(model, sites, shape.get_text_config().vocab_size, context_length(model))


def model_of(request: Request) -> GradientModel:
    """The service's base model, which is read once."""
    state = request.app.state
    with _making:
        if getattr(state, "gradient_model", None) is None:
            settings = service_of(request).settings
            assert settings.gradients is not None, "the routes are there where it is set"
            state.gradient_model = read_model(settings.model, settings.gradients.sites)
        return state.gradient_model


def plain_site(site: Site) -> dict[str, Any]:
    """A site as JSON has it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(site).items()}


def site_of(values: dict[str, Any]) -> Site:
    """A site that `plain_site` gave."""
    found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Site(**found)


def _without_unreached(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the maps that no gradient comes to in a pass: the head, which passes go round, and tables of
    positions, which are the same for all rows."""
    kept = model.get_input_embeddings()
    head = model.get_output_embeddings()
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child is head or (isinstance(child, nn.Embedding) and child is not kept):
                delattr(parent, name)
    return model
