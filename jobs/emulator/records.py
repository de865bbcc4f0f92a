"""The owner's own record of each version: what it was made from, how it was judged, what its bundle must not tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import AwareDatetime

from ot_ray.artifacts.manifest import to_text
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.config import Config
from ot_ray.errors import NotFoundError
from ot_ray.evaluation import Measured, Verdict
from ot_ray.store import Store


class Record(Config):
    """`records/<model>/<version>.json` in the owner's store."""

    schema_version: Literal[2] = 2
    """Format of this document."""
    model: str
    """The owner's name of the model."""
    version: str
    """The bundle's version."""
    run: str
    """Name of the run that distilled it."""
    outcome: Literal["accepted", "rejected"]
    """Whether the bundle is, or is about to be, published."""
    identity: dict[str, Any]
    """What decides the bundle."""
    bundle_id: str
    """The bundle, published or kept."""
    depth: int
    """Layers of the full model."""
    kept: tuple[int, ...]
    """Layers of the middle that the emulator started from."""
    perplexity: dict[str, float | None]
    """On held-out text; None where a figure was not finite."""
    text: str
    """What identifies that text; empty where there was none."""
    verdict: Verdict
    """The gate's."""
    summary: dict[str, Any]
    """What the distillation returned."""
    config: dict[str, Any]
    """The configuration."""
    created: AwareDatetime
    """When it was judged, UTC."""

    def measured(self) -> Measured | None:
        """The figures for a later comparison; None where there are none."""
        full, emulated = self.perplexity.get("full"), self.perplexity.get("emulated")
        if full is None or emulated is None:
            return None
        return Measured(full=full, emulated=emulated, text=self.text, version=self.version)


class Records:
    """The records of one model."""

    def __init__(self, store: Store, model: str) -> None:
        self._store, self._model = store, model

    def get(self, version: str) -> Record | None:
        """The record of a version; None if there is none. Raises ArtifactError for one that is malformed."""
        key = self.key(version)
        try:
            return parse_json(Record, self._store.read(key), key)
        except NotFoundError:
            return None

    def put(self, record: Record) -> None:
        """Write a record, in place of an earlier one of its version."""
        self._store.write(self.key(record.version), to_text(record))

    def key(self, version: str) -> str:
        """Where a version's record lies."""
        return f"records/{self._model}/{version}.json"


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON takes them."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
