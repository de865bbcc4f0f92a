"""Weights read by ranges: against safetensors' own reader, from a folder and from S3, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from ot_ray.artifacts import Weights, weights
from ot_ray.artifacts.weights import INDEX, SINGLE
from ot_ray.errors import ArtifactError, ConfigError
from ot_ray.store import LocalStore, open_store

SHARDS = {
    "model-00001-of-00002.safetensors": {
        "a.weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
        "b": torch.randn(9, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    },
    "model-00002-of-00002.safetensors": {
        "c": torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2)).half(),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor([2**40, -1]),
    },
}
TENSORS = {name: tensor for shard in SHARDS.values() for name, tensor in shard.items()}


class Recording(LocalStore):
    """A folder that notes which ranges are read."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int]] = []

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.ranges.append((key, end - start))
        return super().read_range(key, start, end)


def write_index(folder: Path, table: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for shard, tensors in SHARDS.items():
        # A model's metadata may be longer than an adapter's.
        save_file(tensors, tmp_path / shard, metadata={"format": "pt", "note": "n" * 1000})
    write_index(tmp_path, {name: shard for shard, tensors in SHARDS.items() for name in tensors})
    return tmp_path


def open_weights(folder: Path) -> Weights:
    return Weights(LocalStore(folder), "here")


def test_types_shapes_and_values(checkpoint: Path) -> None:
    found = open_weights(checkpoint)
    assert {name: (info.dtype, info.shape) for name, info in found.names.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        assert torch.equal(found.read(name), tensor.flatten())
        assert found.read(name).dtype == tensor.dtype
    assert [shard.key for shard in found.shards] == sorted(SHARDS)
    assert [shard.size for shard in found.shards] == [(checkpoint / name).stat().st_size for name in sorted(SHARDS)]


@pytest.mark.parametrize(("start", "end"), [(0, 35), (0, 1), (34, 35), (3, 20), (12, 12), (35, 35)])
@pytest.mark.parametrize("piece", [4, 12, 2**20])
def test_ranges(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, piece: int, start: int, end: int) -> None:
    monkeypatch.setattr(weights, "_PIECE", piece)
    expected = TENSORS["a.weight"].flatten()[start:end]
    assert torch.equal(open_weights(checkpoint).read("a.weight", start, end), expected)


def test_only_what_is_asked_for_is_read(checkpoint: Path) -> None:
    store = Recording(checkpoint)
    found = Weights(store, "here")
    assert len(store.ranges) == 2 * len(SHARDS)  # length and text of each header
    store.ranges.clear()
    found.read("c", 5, 9)
    found.read("a.weight")
    assert store.ranges == [("model-00002-of-00002.safetensors", 8), ("model-00001-of-00002.safetensors", 140)]


def test_single_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    write_index(tmp_path, {"gone": "gone.safetensors"})  # Transformers prefers the single file, too
    found = open_weights(tmp_path)
    assert found.names.keys() == TENSORS.keys()
    assert all(torch.equal(found.read(name), tensor.flatten()) for name, tensor in TENSORS.items())


def test_memory_is_the_callers(checkpoint: Path) -> None:
    found = open_weights(checkpoint)
    found.read("a.weight").zero_()
    assert torch.equal(found.read("a.weight"), TENSORS["a.weight"].flatten())


def test_many_threads_read_at_once(checkpoint: Path) -> None:
    found, wrong = open_weights(checkpoint), []

    def read() -> None:
        for name, tensor in TENSORS.items():
            if not torch.equal(found.read(name), tensor.flatten()):
                wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_from_s3(checkpoint: Path, s3_url: str) -> None:
    store = open_store(s3_url)
    for path in checkpoint.iterdir():
        store.upload(path, path.name)
    found = Weights(store, "bucket")
    assert all(torch.equal(found.read(name), tensor.flatten()) for name, tensor in TENSORS.items())
    assert torch.equal(found.read("a.weight", 3, 20), TENSORS["a.weight"].flatten()[3:20])
    assert all(shard.etag and shard.sha256 for shard in found.shards)


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"here has neither model\.safetensors nor.*save_pretrained"):
        open_weights(tmp_path)


def remove(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def cut_in_the_header(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def empty(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


def garble(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"G16"', 1))


def swap(folder: Path) -> None:
    """A shard of another model under this one's name."""
    (folder / "model-00002-of-00002.safetensors").write_bytes(save({"other": torch.zeros(1)}))


def escape(folder: Path) -> None:
    write_index(folder, {"a": "../model.safetensors"})


def no_table(folder: Path) -> None:
    write_index(folder, [1])


def no_text(folder: Path) -> None:
    write_index(folder, {"a": 1})


def nothing(folder: Path) -> None:
    write_index(folder, {})


def no_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove, r"model-00002-of-00002\.safetensors is missing in here.*fetch the model anew"),
        (cut, r"model-00002-of-00002\.safetensors of here: the tensors end at byte .*; fetch the model anew"),
        (
            cut_in_the_header,
            r"model-00002-of-00002\.safetensors of here says its header has \d+ bytes; the file has 20",
        ),
        (empty, r"model-00002-of-00002\.safetensors of here says its header has 0 bytes"),
        (garble, r"model-00002-of-00002\.safetensors of here: tensor 'c' has dtype 'G16'"),
        (swap, r"model-00002-of-00002\.safetensors of here lacks c, count, flags, scalar.*fetch the model anew"),
        (escape, r"names '\.\./model\.safetensors', which is no safetensors file"),
        (no_table, "weight_map is no table of shards"),
        (no_text, "weight_map is no table of shards"),
        (nothing, "weight_map is no table of shards"),
        (no_json, "not strict JSON"),
    ],
)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(checkpoint)
    with pytest.raises(ArtifactError, match=reason):
        open_weights(checkpoint)


def test_a_shard_cut_while_it_is_read(checkpoint: Path) -> None:
    found = open_weights(checkpoint)
    cut(checkpoint)
    with pytest.raises(ArtifactError, match="of here ends within tensor flags: it was cut"):
        found.read("flags")  # safetensors puts the narrowest type last


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, 36)])
def test_no_range(checkpoint: Path, start: int, end: int) -> None:
    with pytest.raises(ArtifactError, match=rf"elements {start} to {end} of a.weight are no range of its 35"):
        open_weights(checkpoint).read("a.weight", start, end)


def test_no_such_tensor(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="here has no tensor x"):
        open_weights(checkpoint).read("x")
