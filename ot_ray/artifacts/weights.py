"""The tensors of a safetensors checkpoint, read by ranges from wherever a store keeps it.

Only headers and the ranges that are asked for are read. What the tensors are to a model is left to
model_source.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ot_ray.artifacts.safetensors_header import LENGTH_BYTES, HeaderTensor, header_length, parse_header
from ot_ray.artifacts.strict_json import parse_object
from ot_ray.errors import ArtifactError, ConfigError, NotFoundError
from ot_ray.store import ObjectInfo, Store

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_PIECE = 64 * 1024 * 1024  # bytes of one request, which bounds what a read holds beside its result
_NOWHERE = ""  # the shard of a tensor that is zeros
_AGAIN = "fetch the model anew"


class TensorInfo(NamedTuple):
    """What a checkpoint says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class _Place(NamedTuple):
    info: TensorInfo
    shard: str
    start: int  # first byte in the shard


class Weights:
    """The tensors of a checkpoint: one `model.safetensors`, or an index and its shards.

    Every header is read once, here; a tensor only when, and as far as, it is asked for. Any number of threads
    may read.
    """

    names: Mapping[str, TensorInfo]
    """Type and shape of each tensor."""
    shards: tuple[ObjectInfo, ...]
    """The files that hold the tensors, by name."""

    def __init__(self, store: Store, where: str) -> None:
        """Args:
            store: the checkpoint's files lie at its root.
            where: how messages name the checkpoint.

        Raises:
            ConfigError: there are no safetensors weights.
            ArtifactError: the index is malformed; a shard is missing, truncated or corrupt, or lacks a tensor.
        """
        self._store, self._where = store, where
        self._places: dict[str, _Place] = {}
        shards = []
        for shard, names in self._shards().items():
            info, tensors = self._open(shard)
            shards.append(info)
            self._take(shard, tensors, names)
        self.shards = tuple(shards)
        self.names = {name: place.info for name, place in self._places.items()}

    def read_as_zeros(self, name: str, shape: tuple[int, ...]) -> None:
        """Let a tensor that the checkpoint lacks be read as float32 zeros of that shape."""
        self._places[name] = _Place(TensorInfo(torch.float32, shape), _NOWHERE, 0)
        self.names = {**self.names, name: self._places[name].info}

    def read(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Elements `start` up to, not including, `end` of a flattened tensor.

        Returns:
            [end - start], in the stored type, in memory of its own.

        Raises:
            ArtifactError: there is no such tensor or range, or the shard has been cut since it was opened.
            StoreError: the store does not hand the bytes out.
        """
        if name not in self._places:
            raise ArtifactError(f"{self._where} has no tensor {name}; {_AGAIN}")
        (dtype, shape), shard, first = self._places[name]
        end = math.prod(shape) if end is None else end
        if not 0 <= start <= end <= math.prod(shape):
            raise ArtifactError(f"elements {start} to {end} of {name} are no range of its {math.prod(shape)} elements")
        if shard == _NOWHERE:
            return torch.zeros(end - start, dtype=dtype)
        tensor = torch.empty(end - start, dtype=dtype)
        target = tensor.view(torch.uint8).numpy().data
        first += start * dtype.itemsize
        for offset in range(0, len(target), _PIECE):
            size = min(_PIECE, len(target) - offset)
            data = self._store.read_range(shard, first + offset, first + offset + size)
            if len(data) != size:
                raise ArtifactError(f"{shard} of {self._where} ends within tensor {name}: it was cut; {_AGAIN}")
            target[offset : offset + size] = data
        return tensor

    def _shards(self) -> dict[str, set[str] | None]:
        """The tensors that the index expects of each shard; None where there is no index."""
        if self._store.exists(SINGLE):
            return {SINGLE: None}
        try:
            index = self._store.read(INDEX)
        except NotFoundError:
            raise ConfigError(
                f"{self._where} has neither {SINGLE} nor {INDEX}; convert its weights once: "
                "AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder) writes safetensors; put the "
                "tokenizer beside them in the same way (AutoTokenizer), and set model.source to that folder"
            ) from None
        return {**shards_of(index, self._where)}

    def _open(self, shard: str) -> tuple[ObjectInfo, dict[str, _Place]]:
        try:
            info = self._store.info(shard)
        except NotFoundError:
            raise ArtifactError(f"{shard} is missing in {self._where}, and {INDEX} names it; {_AGAIN}") from None
        where = f"{shard} of {self._where}"
        try:
            data = LENGTH_BYTES + header_length(self._store.read_range(shard, 0, LENGTH_BYTES), info.size, where)
            text = self._store.read_range(shard, LENGTH_BYTES, data)
            header = parse_header(text, info.size, where, any_metadata=True)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; {_AGAIN}") from None
        return info, {name: _place(tensor, shard, data) for name, tensor in header.items()}

    def _take(self, shard: str, tensors: dict[str, _Place], names: set[str] | None) -> None:
        lacking = sorted((names or set()) - tensors.keys())
        if lacking:
            raise ArtifactError(
                f"{shard} of {self._where} lacks {', '.join(lacking[:5])}, which {INDEX} places there; {_AGAIN}"
            )
        self._places |= tensors if names is None else {name: tensors[name] for name in names}


def shards_of(index: bytes, where: str) -> dict[str, set[str]]:
    """The names of the tensors in each shard, by the text of an index.

    Args:
        where: how messages name the checkpoint.

    Raises:
        ArtifactError: the index is malformed, or names what is no safetensors file.
    """
    table = parse_object(index, INDEX).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise ArtifactError(f"{INDEX} of {where}: weight_map is no table of shards; {_AGAIN}")
    shards: dict[str, set[str]] = {}
    for shard in sorted(set(table.values())):
        if not _SHARD.fullmatch(shard):
            raise ArtifactError(f"{INDEX} of {where} names {shard[:80]!r}, which is no safetensors file")
        shards[shard] = {name for name, holder in table.items() if holder == shard}
    return shards


def _place(tensor: HeaderTensor, shard: str, data: int) -> _Place:
    return _Place(TensorInfo(_TYPES[tensor.dtype], tensor.shape), shard, data + tensor.start)
