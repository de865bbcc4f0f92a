"""What a service is configured with, from a file, `key=value` overrides or a Serve config file's args."""

from __future__ import annotations

from pydantic import Field, field_validator

from ot_ray.config import Config
from ot_ray.model.loading import ModelConfig


class ServeConfig(Config):
    """One base model with the plug-in models that a store holds for it."""

    model: ModelConfig
    """The base model; its name is its id in the API, and part of its plug-ins' ids: `ft:<name>:<tenant>:...`."""
    store: str | None = None
    """URL of the store with the registry of promoted plug-ins; null serves the base model alone."""
    max_plug_ins: int = Field(8, ge=1)
    """Plug-in models that stay in memory at once, each costing its adapter layers' bytes."""
    max_concurrent: int = Field(4, ge=1)
    """Requests that generate at the same time on one engine; further ones wait their turn."""
    max_choices: int = Field(32, ge=1)
    """Largest number of choices (prompts times n) of one request."""
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    """Largest request body, in bytes."""
    wait_s: float = Field(60.0, gt=0)
    """Seconds that a request waits for its turn, or for room for its plug-in, before it is refused."""
    refresh_s: float = Field(10.0, ge=0)
    """Seconds for which a reading of the registry is good: how late promotions and withdrawals are seen."""
    engines: int = Field(1, ge=1)
    """Replicas of the engine; each holds the whole base model."""
    num_cpus: float = Field(1.0, ge=0)
    """CPU cores that Ray sets aside for each engine."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs for each engine; 0 runs on the CPU."""
    max_ongoing_requests: int = Field(64, ge=1)
    """Requests that one engine accepts at once, those that wait for their turn included."""
    max_queued_requests: int = Field(256, ge=1)
    """Requests that wait for an engine to accept them; further ones are answered 429."""
    host: str = "127.0.0.1"
    """Address that `run` listens on; a Serve config file has its own `http_options` instead."""
    port: int = Field(8000, ge=1, le=65535)
    """Port that `run` listens on."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Seconds that `run` waits until the model can answer."""

    @field_validator("host")
    @classmethod
    def _is_plain(cls, host: str) -> str:
        if not host or any(letter in host for letter in "/: "):
            raise ValueError("not a host name or IPv4 address; write 127.0.0.1, or 0.0.0.0 for every interface")
        return host
