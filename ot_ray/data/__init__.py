"""Text to batches: reading, tokenising, packing, and an order that resumes. Knows nothing of models,
Ray or training loops."""

from __future__ import annotations

from ot_ray.data.batches import Batches, BatchStream, rows_of
from ot_ray.data.chat import render
from ot_ray.data.cpython import docstrings, language_reference, write_quickstart_data
from ot_ray.data.digest import resolved_revision, source_digest
from ot_ray.data.documents import DataConfig, read_documents
from ot_ray.data.examples import Conversation, Document, Example, Message, Segment
from ot_ray.data.files import FileInfo, Files, bucket_address
from ot_ray.data.load import Counts, PackedDataset, first_sequences, load_sequences
from ot_ray.data.packing import PackedSequence, collate, pack, without_padding
from ot_ray.data.streaming import StreamConfig, TextStream, open_stream
from ot_ray.data.tokens import TokenSpan, tokenize

__all__ = [
    "BatchStream",
    "Batches",
    "Conversation",
    "Counts",
    "DataConfig",
    "Document",
    "Example",
    "FileInfo",
    "Files",
    "Message",
    "PackedDataset",
    "PackedSequence",
    "Segment",
    "StreamConfig",
    "TextStream",
    "TokenSpan",
    "bucket_address",
    "collate",
    "docstrings",
    "first_sequences",
    "language_reference",
    "load_sequences",
    "open_stream",
    "pack",
    "read_documents",
    "render",
    "resolved_revision",
    "rows_of",
    "source_digest",
    "tokenize",
    "without_padding",
    "write_quickstart_data",
]
