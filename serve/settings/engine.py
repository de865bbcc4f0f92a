"""How text is generated: one base model, the plug-in models around it, and what may run at once."""

from __future__ import annotations

from pydantic import Field

from ot_ray.config import Config
from ot_ray.model.loading import ModelConfig


class EngineConfig(Config):
    """One base model with the plug-in models that a store holds for it."""

    model: ModelConfig
    """The base model; its name is its id in the API, and part of its plug-ins' ids: `ft:<name>:<tenant>:...`."""
    store: str | None = None
    """URL of the store with the registry of promoted plug-ins; null serves the base model alone."""
    max_plug_ins: int = Field(default=8, ge=1)
    """Adapters that stay on each engine's device at once, each costing its adapter layers' bytes."""
    max_host_plug_ins: int = Field(default=32, ge=0)
    """Adapters that stay in the host's memory besides, so that they come back to the device without the store."""
    max_concurrent: int = Field(default=32, ge=1)
    """Choices that one engine generates at the same time, in one batch; further ones wait their turn."""
    max_batch_tokens: int = Field(default=65_536, ge=1)
    """Bound on choices in the batch times the tokens (prompt and answer so far) of the longest: how large the key-value
    cache gets. Where answers outgrow it, the choices that began last wait for room and go on from where they were. A
    single choice may have more."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests that wait for room in one engine's batch; further ones are answered 429."""
    max_choices: int = Field(default=32, ge=1)
    """Largest number of choices (prompts times n) of one request."""
    wait_s: float = Field(default=60.0, gt=0)
    """Seconds that a request waits for its turn, room for its adapter included, before it is refused."""
    refresh_s: float = Field(default=2.0, ge=0)
    """Seconds for which a reading of the registry is good: how late promotions and withdrawals are seen."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs for each engine; 0 runs on the CPU."""
