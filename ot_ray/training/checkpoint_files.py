"""What one checkpoint holds in the store: a file of tensors and a table a rank, read back by ranges.

When checkpoints are taken, committed and removed is left to checkpoints.py."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from pydantic import Field

from ot_ray.config import C, Config, parse
from ot_ray.errors import ConfigError, NotFoundError, TrainingError
from ot_ray.store import Store
from ot_ray.training.shards import MOMENTS, WEIGHT, Piece

KINDS = (WEIGHT, *MOMENTS)
"""What is kept of every trainable element: the float32 weight and AdamW's two averages."""

_BYTES = 4  # of a float32, little-endian as safetensors has it
_FLOAT = np.dtype("<f4")
_OPEN_FILES = Path("/proc/self/fd")  # where the system has it
_CHUNK = 16 * 1024 * 1024  # elements read at a time


class PieceRecord(Config):
    """Where elements of one kind of one parameter lie in a rank's file."""

    kind: str
    """One of `KINDS`."""
    name: str
    """The parameter's name."""
    start: int = Field(ge=0)
    """First element in the flattened parameter."""
    elements: int = Field(ge=1)
    """How many elements."""
    offset: int = Field(ge=0)
    """First byte in the file."""
    crc32: int = Field(ge=0)
    """Checksum of the bytes, for readers that want all of them."""


class FileRecord(Config):
    """A rank's file of tensors."""

    name: str
    """Its name beside the table."""
    size: int = Field(ge=0)
    """Bytes."""
    sha256: str
    """Of all bytes, in hexadecimal."""


class RankRecord(Config):
    """The table of one rank, written once its file is whole in the store."""

    file: FileRecord | None = None
    """Unset where the rank has nothing to keep."""
    pieces: list[PieceRecord]
    """What lies in the file."""
    stream: dict[str, Any]
    """This rank's position in the data."""
    random: dict[str, str]
    """State of the random generators by device, in hexadecimal."""


class Commit(Config):
    """The last write of a checkpoint; without it there is none."""

    step: int = Field(ge=1)
    """Optimiser steps done."""
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Folder of the ranks' files; a step that is tried again gets another."""
    world_size: int = Field(ge=1)
    """Ranks that wrote."""
    fingerprint: dict[str, Any]
    """What the run is made of."""


def write_part(
    store: Store, place: str, rank: int, pieces: Sequence[Piece], stream: Mapping[str, Any], random: Mapping[str, str]
) -> None:
    """Put a rank's tensors, then its table, under `place` of the store."""
    file, records = None, []
    if pieces:
        name = f"rank-{rank}.safetensors"
        with _scratch_file() as (scratch, path):
            records = _write_tensors(scratch, pieces)
            info = store.upload(path, f"{place}/{name}")
        file = FileRecord(name=name, size=info.size, sha256=info.sha256 or "")
    record = RankRecord(file=file, pieces=records, stream=dict(stream), random=dict(random))
    store.write(f"{place}/{table_name(rank)}", record.model_dump_json().encode())


def table_name(rank: int) -> str:
    """Name of a rank's table beside its file."""
    return f"rank-{rank}.json"


def read_record(store: Store, key: str, cls: type[C]) -> C:
    """A commit or a rank's table.

    Raises:
        TrainingError: it is not there, or is none.
    """
    try:
        return parse(cls, json.loads(store.read(key)), key)
    except (NotFoundError, ConfigError, ValueError, TypeError) as error:
        raise damaged(key, str(error)) from error


def damaged(key: str, what: str) -> TrainingError:
    """The error for a file of a checkpoint that cannot be used."""
    commit = re.sub(r"(step-\d+)/.*", r"\1/commit.json", key)
    return TrainingError(
        f"checkpoint file {key}: {what}; restore it, or delete {commit} to resume from the checkpoint before"
    )


class SavedState:
    """The tensors of a committed checkpoint, whatever the number of ranks that wrote it.

    Args:
        place: folder of the attempt in the store.
        records: the ranks' tables, by rank.
    """

    def __init__(self, store: Store, place: str, records: Sequence[RankRecord]) -> None:
        self._store, self._place = store, place
        self._files = [record.file for record in records if record.file is not None]
        self._pieces: dict[tuple[str, str], list[tuple[PieceRecord, str]]] = {}
        for record in records:
            for piece in record.pieces:
                key = f"{place}/{record.file.name}" if record.file else place
                self._pieces.setdefault((piece.kind, piece.name), []).append((piece, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda entry: entry[0].start)

    def check_files(self) -> None:
        """Look at size and, where the store keeps it, sha256 of every file; their bytes are not read.

        Raises:
            TrainingError: a file is missing, short or another one.
        """
        for file in self._files:
            key = f"{self._place}/{file.name}"
            try:
                info = self._store.info(key)
            except NotFoundError as error:
                raise damaged(key, "it is missing") from error
            if info.size != file.size:
                raise damaged(key, f"it has {info.size} bytes, {file.size} were written")
            if info.sha256 is not None and info.sha256 != file.sha256:
                raise damaged(key, "its sha256 is not that of what was written")

    def check_names(self, sizes: Mapping[str, int]) -> None:
        """Compare with a model's trainable parameters and their numbers of elements.

        Raises:
            TrainingError: a parameter is in one of them only, differs in size, or is not covered once.
        """
        theirs = {name for _, name in self._pieces}
        for name in sorted(theirs ^ sizes.keys()):
            where = "checkpoint" if name in theirs else "model"
            raise _not_ours(f"{name} is only in the {where}")
        for name, size in sizes.items():
            for kind in KINDS:
                end = 0
                for piece, _ in self._pieces.get((kind, name), []):
                    if piece.start != end:
                        raise _not_ours(f"{kind} of {name} has a hole or an overlap at element {end}")
                    end += piece.elements
                if end != size:
                    raise _not_ours(f"{kind} of {name} has {end} elements there and {size} in the model")

    def read(self, kind: str, name: str, start: int, end: int) -> torch.Tensor:
        """Elements `start` to `end` of the flattened parameter, float32 on the CPU, from whichever files hold them.

        Raises:
            TrainingError: a file is missing, short or changed.
        """
        result = torch.empty(end - start, dtype=torch.float32)
        for piece, key in self._pieces[kind, name]:
            first, last = max(start, piece.start), min(end, piece.start + piece.elements)
            if first < last:
                target = result[first - start : last - start].numpy()
                self._read_piece(key, piece, first - piece.start, target)
        return result

    def _read_piece(self, key: str, piece: PieceRecord, skip: int, target: np.ndarray) -> None:
        checksum = 0
        for first in range(0, len(target), _CHUNK):
            part = target[first : first + _CHUNK]
            offset = piece.offset + _BYTES * (skip + first)
            try:
                data = self._store.read_range(key, offset, offset + _BYTES * len(part))
            except NotFoundError as error:
                raise damaged(key, "it is missing") from error
            if len(data) != _BYTES * len(part):
                raise damaged(key, f"it ends before byte {offset + _BYTES * len(part)}")
            checksum = zlib.crc32(data, checksum)
            part[:] = np.frombuffer(data, _FLOAT)
        # A part of a piece has no checksum of its own.
        if len(target) == piece.elements and checksum != piece.crc32:
            raise damaged(key, f"the bytes of {piece.kind} of {piece.name} are not those that were written")


def _not_ours(what: str) -> TrainingError:
    return TrainingError(
        f"the checkpoint's trainable tensors are not the model's: {what}; resume with the configuration that wrote it"
    )


@contextlib.contextmanager
def _scratch_file() -> Iterator[tuple[IO[bytes], Path]]:
    """A file in the temporary folder and a path to it."""
    if _OPEN_FILES.is_dir():
        # Without a name it goes with the process, even one that is killed; checkpoints are large.
        with tempfile.TemporaryFile() as file:
            yield file, _OPEN_FILES / str(file.fileno())
    else:
        with tempfile.NamedTemporaryFile() as file:
            yield file, Path(file.name)


def _write_tensors(file: IO[bytes], pieces: Sequence[Piece]) -> list[PieceRecord]:
    """Write a safetensors file tensor by tensor; the format's own writer copies all of them first."""
    header, end = {}, 0
    for piece in pieces:
        begin, end = end, end + _BYTES * piece.tensor.numel()
        name = f"{piece.kind}/{piece.name}/{piece.start}"
        header[name] = {"dtype": "F32", "shape": [piece.tensor.numel()], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    records = []
    file.write(struct.pack("<Q", len(text)) + text)
    for piece in pieces:
        data = _bytes_of(piece.tensor)
        records.append(
            PieceRecord(
                kind=piece.kind,
                name=piece.name,
                start=piece.start,
                elements=piece.tensor.numel(),
                offset=file.tell(),
                crc32=zlib.crc32(data),
            )
        )
        file.write(data)
    file.flush()
    return records


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.contiguous().numpy().astype(_FLOAT, copy=False)
    return memoryview(array).cast("B")
