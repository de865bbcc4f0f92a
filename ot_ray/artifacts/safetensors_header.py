"""A safetensors header from outside, parsed in plain Python before any library opens the file.

It refuses what the format's own reader lets through: duplicate keys, path-like names, empty tensors with
huge shapes. The values of tensors are left to inspection.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ot_ray.artifacts.strict_json import parse_object
from ot_ray.errors import ArtifactError
from ot_ray.store.partial import disk_errors

LENGTH_BYTES = 8  # at the start of a file: the length of its header
MAX_HEADER = 8 * 1024 * 1024  # bytes
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MOST_METADATA, _LONGEST_TEXT, _MOST_DIMENSIONS = 16, 256, 8


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor as the header announces it; `start` and `end` are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, HeaderTensor]:
    """Parse and check the header of a safetensors file.

    Returns:
        The tensors by name. Together they cover the file to its last byte.

    Raises:
        ArtifactError: lists everything that is wrong with the header.
    """
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        size = path.stat().st_size
        text = file.read(header_length(file.read(LENGTH_BYTES), size, path.name))
    return parse_header(text, size, path.name)


def header_length(first: bytes, size: int, where: str) -> int:
    """Bytes of the header that follows the first `LENGTH_BYTES` bytes of a file of `size` bytes.

    Raises:
        ArtifactError: the file is no safetensors file.
    """
    length = int.from_bytes(first, "little")
    if size < LENGTH_BYTES + 2 or not 2 <= length <= min(size - LENGTH_BYTES, MAX_HEADER):
        raise ArtifactError(
            f"{where} says its header has {length} bytes; the file has {size}, and a header at most "
            f"{MAX_HEADER}: it is no safetensors file; write it anew"
        )
    return length


def parse_header(text: bytes, size: int, where: str, *, any_metadata: bool = False) -> dict[str, HeaderTensor]:
    """Parse and check a header that has been read already.

    Args:
        size: bytes of the whole file.
        where: the file's name, for messages.
        any_metadata: take metadata of any length, as in a model of the owner's.

    Raises:
        ArtifactError: lists everything that is wrong with the header.
    """
    values = parse_object(text, f"the header of {where}")
    metadata = values.pop("__metadata__", {})
    problems = [] if any_metadata else _check_metadata(metadata)
    tensors: dict[str, HeaderTensor] = {}
    for name, value in values.items():
        try:
            tensors[name] = _tensor(name, value)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        problems = _check_layout(tensors, size - LENGTH_BYTES - len(text))
    if problems:
        raise ArtifactError("; ".join(f"{where}: {problem}" for problem in problems))
    return tensors


def _check_metadata(metadata: Any) -> list[str]:
    if not isinstance(metadata, dict) or len(metadata) > _MOST_METADATA:
        return [f"__metadata__ is no object of at most {_MOST_METADATA} strings; leave it out"]
    return [
        f"__metadata__ holds {key[:80]!r}, which is no string of at most {_LONGEST_TEXT} letters; leave it out"
        for key, value in metadata.items()
        if not isinstance(value, str) or len(key) > _LONGEST_TEXT or len(value) > _LONGEST_TEXT
    ]


def _tensor(name: str, value: Any) -> HeaderTensor:
    shown = repr(name[:80])
    if len(name) > _LONGEST_TEXT or not _NAME.fullmatch(name):
        raise ValueError(f"tensor {shown} has a name that no model uses; use letters, digits, `_` and `.`")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {shown} has dtype {str(dtype)[:80]!r}; use one of {', '.join(DTYPE_BYTES)}")
    if not _integers(shape) or len(shape) > _MOST_DIMENSIONS or any(size < 1 for size in shape):
        raise ValueError(
            f"tensor {shown} has shape {str(shape)[:80]}; use up to {_MOST_DIMENSIONS} dimensions of at least 1"
        )
    if not _integers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {shown} has data_offsets {str(offsets)[:80]}; use two integers")
    wanted = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"tensor {shown} of shape {shape} and dtype {dtype} takes {wanted} bytes, "
            f"but its data_offsets are {offsets}"
        )
    return HeaderTensor(dtype, tuple(shape), offsets[0], offsets[1])


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_layout(tensors: dict[str, HeaderTensor], data: int) -> list[str]:
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != position:
            return [f"tensor {name!r} starts at byte {tensor.start}, not at {position}: a hole or an overlap"]
        position = tensor.end
    if position != data:
        return [f"the tensors end at byte {position} of the data, which has {data} bytes"]
    return []
