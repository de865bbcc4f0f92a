"""How gradient learning is served: what one session and one operation may have, and how passes of the base are made."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ot_ray.config import Config

Coding = Literal["none", "bfloat16", "int8", "fp8"]


class GradientsConfig(Config):
    """Gradient learning (`/v1/cola`); it has a copy of the base model's weights of its own."""

    replicas: int = Field(default=1, ge=1)
    """Processes that make passes, each with the whole base model; they share the database and the store."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores that Ray sets aside for each."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs for each; 0 runs on the CPU."""
    sites: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Shell patterns of the maps that customers may choose as sites. Inputs and gradients of a map tell of the weights
    before and behind it: name the adapter layers alone where the middle is to stay secret."""
    max_rows: int = Field(default=64, ge=1)
    """Rows of all sessions together in one pass."""
    max_tokens: int = Field(default=32_768, ge=1)
    """Rows of a pass times the tokens of its longest row."""
    operation_rows: int = Field(default=64, ge=1)
    """Rows of one operation; further ones are refused."""
    operation_tokens: int = Field(default=32_768, ge=2)
    """Tokens of one operation's rows together, padded to its longest."""
    operation_bytes: int = Field(default=2 * 2**30, ge=1024)
    """Inputs and gradients that one operation may yield at its session's sites, in bytes of float32."""
    sample_tokens: int = Field(default=256, ge=1)
    """Longest answer of one sample, in tokens."""
    max_rank: int = Field(default=256, ge=1)
    """Largest rank, or inner width, of an auxiliary."""
    max_auxiliary_bytes: int = Field(default=2**30, ge=1024)
    """Largest auxiliary, in bytes of float32."""
    codings: tuple[Coding, ...] = ("none", "bfloat16", "int8", "fp8")
    """How gradients may be coded."""
    open_sessions: int = Field(default=32, ge=1)
    """Sessions that one tenant may have open; a further one is answered 429."""
    queued_operations: int = Field(default=16, ge=1)
    """Operations of one session that have not ended; a further one is answered 429."""
    idle_s: int = Field(default=24 * 3600, ge=60)
    """Seconds without an operation after which a session is closed and its files are removed."""
    lease_s: float = Field(default=60.0, ge=1)
    """Seconds without a word of its process after which another one takes over an operation."""
    poll_s: float = Field(default=0.2, gt=0)
    """Seconds between two looks for work where there was none."""
    attempts: int = Field(default=3, ge=1)
    """Processes that may be lost over one operation before it fails."""
    cached_bytes: int = Field(default=2 * 2**30, ge=0)
    """Bytes of auxiliaries and fitters' states that stay in memory between operations, so that they are not read
    again."""

    @model_validator(mode="after")
    def _an_operation_fits_a_pass(self) -> GradientsConfig:
        for one, all_ in (("operation_rows", "max_rows"), ("operation_tokens", "max_tokens")):
            if getattr(self, one) > getattr(self, all_):
                raise ValueError(
                    f"{one} is {getattr(self, one)}, above {all_} ({getattr(self, all_)}), so that no pass would hold "
                    "such an operation; raise the latter"
                )
        return self
