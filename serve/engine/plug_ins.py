"""The promoted plug-ins of one base model, as the service reads them from the registry in a store.

Promoting and withdrawing is done in the registry; keeping models in memory is residency.py's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ot_ray.artifacts import Registry, parse_model_id
from ot_ray.errors import NotFoundError
from ot_ray.model import SplitPlan


@dataclass(frozen=True)
class PlugIn:
    """What is known of a promoted plug-in without loading it."""

    model_id: str
    plan: SplitPlan
    created: int
    """Seconds since 1970."""
    owner: str


class Catalogue(Protocol):
    """Where the promoted plug-ins of one base model are found."""

    def current(self) -> Sequence[PlugIn]:
        """Every plug-in that may be served now."""
        ...

    def load_state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        """The adapter's tensors, named as `ot_ray.model.adapter_state` names them."""
        ...


class NoPlugIns:
    """The catalogue of a base model that is served alone."""

    def current(self) -> Sequence[PlugIn]:
        return []

    def load_state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        raise NotFoundError(f"{model_id}: this service has no registry of plug-ins; set store=...")


class RegistryCatalogue:
    """The plug-ins of one base model in a registry, which may hold those of others too.

    Args:
        model: the base model's name, the second part of its plug-ins' ids.
    """

    def __init__(self, registry: Registry, model: str) -> None:
        self._registry, self._model = registry, model

    def current(self) -> Sequence[PlugIn]:
        """Read the registry; errors are the registry's."""
        return [
            PlugIn(record.model_id, record.plan, int(record.created.timestamp()), parts.tenant)
            for record in self._registry.current()
            if (parts := parse_model_id(record.model_id)).model == self._model
        ]

    def load_state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        """Load and verify a plug-in's tensors; errors are the registry's."""
        return self._registry.load_state(model_id)
