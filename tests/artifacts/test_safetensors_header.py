from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ot_ray.artifacts.safetensors_header import DTYPE_BYTES, MAX_HEADER, HeaderTensor, read_header
from ot_ray.errors import ArtifactError

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(path: Path, header: Any, data: int = 8, length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a.weight": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c.0.bias": torch.tensor(1.5, dtype=torch.float16),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {name: (found.dtype, found.shape) for name, found in header.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c.0.bias": ("F16", ()),
    }


def test_offsets_are_kept(tmp_path: Path) -> None:
    second = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}
    path = file_of(tmp_path / "x", {"b": second, "a": GOOD}, data=11)
    assert read_header(path) == {"a": HeaderTensor("F32", (2,), 0, 8), "b": HeaderTensor("U8", (3,), 8, 11)}


def test_dtypes_have_the_sizes_of_torch() -> None:
    names = {"F32": "float32", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "I64": "int64", "BOOL": "bool"}
    assert {name: getattr(torch, text).itemsize for name, text in names.items()} == {
        name: DTYPE_BYTES[name] for name in names
    }


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ('{"a": {}, "a": {}}', "'a' stands twice"),
        ('{"a": {"dtype": "F32", "dtype": "F64", "shape": [], "data_offsets": [0, 4]}}', "'dtype' stands twice"),
        ("[]", "not an object"),
        ("{]", "not strict JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[" * 9000 + "]" * 9000, "not strict JSON"),
        ({"../../x": GOOD}, "a name that no model uses"),
        ({"a/b": GOOD}, "a name that no model uses"),
        ({"": GOOD}, "a name that no model uses"),
        ({"a..b": GOOD}, "a name that no model uses"),
        ({"a\n": GOOD}, "a name that no model uses"),
        ({"a" * 300: GOOD}, "a name that no model uses"),
        ({"a": {**GOOD, "shape": [0, 10**12], "data_offsets": [0, 0]}}, "dimensions of at least 1"),
        ({"a": {**GOOD, "shape": [-1, -2]}}, "dimensions of at least 1"),
        ({"a": {**GOOD, "shape": [2.0]}}, "dimensions of at least 1"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "dimensions of at least 1"),
        ({"a": {**GOOD, "shape": [1] * 8 + [2]}}, "up to 8 dimensions"),
        ({"a": {**GOOD, "dtype": "F31"}}, "dtype 'F31'"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "dtype"),
        ({"a": {**GOOD, "data_offsets": [0, 7]}}, "takes 8 bytes"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "use two integers"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, "starts at byte 4, not at 0"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "starts at byte -8"),
        ({"a": GOOD, "b": GOOD}, "a hole or an overlap"),
        ({"a": {**GOOD, "extra": 1}}, "exactly dtype, shape and data_offsets"),
        ({"a": [1]}, "exactly dtype, shape and data_offsets"),
        ({}, "end at byte 0 of the data, which has 8"),
        ({"__metadata__": {"format": 1}, "a": GOOD}, "'format', which is no string"),
        ({"__metadata__": {"format": "x" * 300}, "a": GOOD}, "'format', which is no string"),
        ({"__metadata__": [], "a": GOOD}, "no object of at most"),
        ({"__metadata__": {str(i): "" for i in range(17)}, "a": GOOD}, "no object of at most"),
    ],
)
def test_refused(tmp_path: Path, header: Any, reason: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(reason)):
        read_header(file_of(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("data", [7, 9])
def test_length_of_the_file_is_exact(tmp_path: Path, data: int) -> None:
    with pytest.raises(ArtifactError, match=f"of the data, which has {data} bytes"):
        read_header(file_of(tmp_path / "x", {"a": GOOD}, data=data))


@pytest.mark.parametrize("length", [0, 1, 10**6, MAX_HEADER + 1, 2**64 - 1])
def test_length_of_the_header_is_bounded(tmp_path: Path, length: int) -> None:
    with pytest.raises(ArtifactError, match=f"says its header has {length} bytes"):
        read_header(file_of(tmp_path / "x", {"a": GOOD}, length=length))


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x", "{}", data=MAX_HEADER, length=MAX_HEADER + 1)
    with pytest.raises(ArtifactError, match="a header at most"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 4, 9])
def test_tiny_files_are_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(ArtifactError, match="no safetensors file"):
        read_header(tmp_path / "x")


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    header = {"a": {**GOOD, "dtype": "X"}, "b/": GOOD}
    with pytest.raises(ArtifactError, match=r"'a'.*'b/'"):
        read_header(file_of(tmp_path / "x", header))
