"""Frames between a stream and its worker processes: a header of JSON, then the tensors' bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from ot_ray.data.packing import PackedSequence, collate

_SIZES = struct.Struct("<QQ")
_NUMBERS = ("input_ids", "position_ids", "labels")


def write_frame(stream: IO[bytes], header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Write one frame. Raises BrokenPipeError if nobody reads."""
    text = json.dumps(header).encode()
    stream.write(_SIZES.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next frame, or None if the other side has ended, also in the middle of a frame."""
    sizes = stream.read(_SIZES.size)
    if len(sizes) < _SIZES.size:
        return None
    header, payload = _SIZES.unpack(sizes)
    text, data = stream.read(header), stream.read(payload)
    return (json.loads(text), data) if len(text) == header and len(data) == payload else None


def to_bytes(sequences: Sequence[PackedSequence]) -> bytes:
    """Sequences of one length as bytes."""
    batch = collate(sequences)
    return b"".join(batch[name].numpy().tobytes() for name in (*_NUMBERS, "real"))


def to_batch(data: bytes, rows: int, length: int) -> dict[str, Tensor]:
    """The batch, as `collate` makes it, of what `to_bytes` made."""
    count = rows * length
    held = bytearray(data)
    numbers = torch.frombuffer(held, dtype=torch.int64, count=len(_NUMBERS) * count).view(-1, rows, length)
    real = torch.frombuffer(held, dtype=torch.bool, offset=numbers.nbytes).view(rows, length)
    return {**dict(zip(_NUMBERS, numbers, strict=True)), "real": real}
