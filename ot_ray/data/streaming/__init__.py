"""Text that is read, tokenised and packed while training runs, in an order that any number of ranks shares.

Holding a whole source in memory is left to `load_sequences`."""

from __future__ import annotations

from ot_ray.data.streaming.config import StreamConfig
from ot_ray.data.streaming.stream import TextStream, open_stream

__all__ = ["StreamConfig", "TextStream", "open_stream"]
