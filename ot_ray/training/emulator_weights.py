"""The weights that a distillation leaves behind: written tensor by tensor, so that no rank holds the whole emulator.

Which tensors they are is the model room's affair; bundles are artifacts'."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from ot_ray.store import Store

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


DISTILLED, START = "emulator", "start"
"""What a run ends with, and, where layers get smaller maps, what it starts from."""


def weights_key(run: str, name: str = DISTILLED) -> str:
    """Where the weights of a run lie in the store."""
    return f"runs/{run}/{name}.safetensors"


def write_weights(
    store: Store,
    run: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    name: str = DISTILLED,
) -> None:
    """Put an emulator's weights into the store, one tensor in memory at a time.

    Args:
        shapes: of all tensors, by name.
        dtype: float32 or bfloat16; tensors are cast to it.
        tensors: each of them once, in any order.
        name: `DISTILLED` or `START`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "emulator.safetensors"
        with path.open("wb") as file:
            places = _write_header(file, shapes, dtype)
            for place, tensor in tensors:
                file.seek(places.pop(place))
                file.write(tensor.to(dtype).reshape(-1).view(torch.uint8).numpy().data)
        assert not places, f"no values came for {sorted(places)}"
        store.upload(path, weights_key(run, name))


def distilled_state(store: Store, run: str) -> dict[str, Tensor]:
    """The weights that `distill` left in the store, named ``<layer of E>.<name>``.

    Raises:
        NotFoundError: the run has not finished.
    """
    return _state(store, weights_key(run))


def start_state(store: Store, run: str) -> dict[str, Tensor]:
    """What the emulator starts from, named so, where whoever started the run worked that out. Raises NotFoundError."""
    return _state(store, weights_key(run, START))


def _state(store: Store, key: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "emulator.safetensors"
        store.download(key, path)
        return load_file(path)


def _write_header(file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, int]:
    """Write what safetensors has before the data; the place in the file of each tensor."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    # Data begins at a multiple of 8 bytes, as readers that map the file want it.
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header)
    return {name: 8 + len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
