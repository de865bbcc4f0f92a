"""What the HTTP side works with: the engines, the database, the store, and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ot_ray.store import Store
from serve.config import ServeConfig
from serve.engine.backend import Backend

if TYPE_CHECKING:
    from serve.catalogue import Catalogue


@dataclass(frozen=True)
class Service:
    """One running service; without a catalogue it has no tenants, and answers whoever asks."""

    backend: Backend
    settings: ServeConfig
    catalogue: Catalogue | None = None
    store: Store | None = None
