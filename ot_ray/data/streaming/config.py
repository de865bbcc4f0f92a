"""How a source is streamed. What the source is, `DataConfig` says."""

from __future__ import annotations

from pydantic import Field

from ot_ray.data.documents import DataConfig


class StreamConfig(DataConfig):
    """A source that is read, tokenised and packed while training runs."""

    workers: int = Field(default=2, ge=0, le=64)
    """Processes a rank that tokenise; 0 tokenises in the training process, when a batch is asked for."""

    shuffle_window: int = Field(default=1024, ge=1)
    """Documents of one row of the batches that are shuffled together; 1 keeps their order."""

    passes: int = Field(default=1, ge=1)
    """How often the source may be read; a run that needs more stops with an error."""

    prefetch: int = Field(default=4, ge=1, le=1024)
    """Batches that the processes make ahead."""
