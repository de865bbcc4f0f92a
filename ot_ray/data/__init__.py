"""Text to batches: reading, tokenising, packing, and an order that resumes. Knows nothing of models,
Ray or training loops."""

from __future__ import annotations

from ot_ray.data.batches import BatchStream
from ot_ray.data.cpython import docstrings, language_reference, write_quickstart_data
from ot_ray.data.documents import DataConfig, read_documents
from ot_ray.data.examples import Conversation, Document, Example, Message, Segment
from ot_ray.data.load import Counts, PackedDataset, load_sequences
from ot_ray.data.packing import PackedSequence, collate, pack
from ot_ray.data.tokens import TokenSpan, tokenize

__all__ = [
    "BatchStream",
    "Conversation",
    "Counts",
    "DataConfig",
    "Document",
    "Example",
    "Message",
    "PackedDataset",
    "PackedSequence",
    "Segment",
    "TokenSpan",
    "collate",
    "docstrings",
    "language_reference",
    "load_sequences",
    "pack",
    "read_documents",
    "tokenize",
    "write_quickstart_data",
]
