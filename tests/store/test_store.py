"""What every store keeps of the protocol's promises, on a folder and on a real S3 server."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError
from ot_ray.store import ObjectInfo, Store, open_store

MIB = 1024 * 1024
BIG = bytes(range(256)) * 256 * 16 * 12 + b"tail"  # 12 MiB and a little: three parts


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_reads_back_what_was_written_and_replaces_it(store: Store) -> None:
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"second, longer")
    assert store.read("a/b.bin") == b"second, longer"
    assert store.exists("a/b.bin")
    assert (store.info("a/b.bin").key, store.info("a/b.bin").size) == ("a/b.bin", 14)


def test_empty_object(store: Store, tmp_path: Path) -> None:
    store.write("empty", b"")
    store.download("empty", tmp_path / "copy", sha256(b""))
    assert store.read("empty") == store.read_range("empty", 0, 9) == (tmp_path / "copy").read_bytes() == b""


def test_range_is_half_open_and_cut_at_the_end(store: Store) -> None:
    store.write("x", b"0123456789")
    ranges = [(0, 10), (2, 5), (9, 10), (4, 4), (7, 99), (10, 12), (50, 60)]
    assert [store.read_range("x", *r) for r in ranges] == [b"0123456789"[slice(*r)] for r in ranges]
    for start, end in [(-1, 3), (5, 2)]:
        with pytest.raises(StoreError, match="0 <= start <= end"):
            store.read_range("x", start, end)


@pytest.mark.parametrize("key", ["gone", "folder", "folder/x/below-a-file"])
def test_missing_object(store: Store, tmp_path: Path, key: str) -> None:
    store.write("folder/x", b"1")
    assert not store.exists(key)
    calls: list[Callable[[], object]] = [
        lambda: store.read(key),
        lambda: store.read_range(key, 0, 0),
        lambda: store.info(key),
        lambda: store.download(key, tmp_path / "new" / "copy"),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match=key):
            call()
    assert not (tmp_path / "new").exists()
    store.delete(key)
    assert store.read("folder/x") == b"1"


def test_create_refuses_an_object_that_is_there(store: Store) -> None:
    store.create("versions/1", b"one")
    with pytest.raises(AlreadyExistsError, match="versions/1"):
        store.create("versions/1", b"two")
    assert store.read("versions/1") == b"one"
    store.delete("versions/1")
    store.create("versions/1", b"three")
    assert store.read("versions/1") == b"three"


def test_exactly_one_of_racing_creators_wins(store: Store) -> None:
    for version in range(4):
        gate, won = threading.Barrier(6), []

        def race(me: int, key: str, gate: threading.Barrier, won: list[bytes]) -> None:
            gate.wait()
            try:
                store.create(key, b"%d" % me)
                won.append(b"%d" % me)
            except AlreadyExistsError:
                pass

        key = f"v/{version}"
        threads = [threading.Thread(target=race, args=(me, key, gate, won)) for me in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [store.read(key)]


def test_file_goes_up_in_parts_and_down_in_ranges(store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)
    up: list[int] = []
    down: list[int] = []
    info = store.upload(tmp_path / "in", "big", up.append)
    assert info == ObjectInfo("big", len(BIG), sha256(BIG))
    store.download("big", str(tmp_path / "deep" / "out"), sha256(BIG).upper(), down.append)
    assert (tmp_path / "deep" / "out").read_bytes() == BIG
    assert store.read_range("big", 5 * MIB - 2, 5 * MIB + 2) == BIG[5 * MIB - 2 : 5 * MIB + 2]
    assert sum(up) == sum(down) == len(BIG)
    assert min(len(up), len(down)) >= 3
    assert list(store.list()) == ["big"]


def test_upload_of_a_missing_file(store: Store, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(NotFoundError, match=path.name):
            store.upload(path, "x")
    assert list(store.list()) == []


def test_wrong_sha256_leaves_no_file(store: Store, tmp_path: Path) -> None:
    store.write("x", b"data")
    folder = tmp_path / "out"
    with pytest.raises(StoreError, match=sha256(b"data")):
        store.download("x", folder / "x", sha256(b"other"))
    assert list(folder.iterdir()) == []
    (folder / "x").write_bytes(b"older")
    with pytest.raises(StoreError, match="sha256"):
        store.download("x", folder / "x", sha256(b"other"))
    assert (folder / "x").read_bytes() == b"older"
    assert len(list(folder.iterdir())) == 1


def test_list_is_sorted_and_keeps_to_the_folder(store: Store) -> None:
    keys = ["a/b/1", "a/b-c", "a/b0", "a/é", "a/B", "a b/+&%?#=", "ab"]
    for key in keys:
        store.write(key, b"")
    assert list(store.list()) == sorted(keys)
    assert list(store.list("a")) == list(store.list("a/")) == sorted(key for key in keys if key.startswith("a/"))
    assert list(store.list("a/b")) == ["a/b/1"]
    assert list(store.list("nothing/here")) == list(store.list("ab")) == []


def test_delete_prefix_keeps_to_the_folder(store: Store) -> None:
    for key in ["t/1/x", "t/1/y/z", "t/10/x", "t/1x"]:
        store.write(key, b"")
    store.delete_prefix("t/1")
    store.delete_prefix("t/1")
    assert list(store.list()) == ["t/10/x", "t/1x"]
    store.delete_prefix("t/1x")
    assert store.exists("t/1x")
    with pytest.raises(StoreError, match="whole store"):
        store.delete_prefix("")


BAD_KEYS = [
    "",
    "/etc/x",
    "..",
    "a/../../b",
    "a/..",
    "./a",
    "a//b",
    "a\\b",
    "a\0b",
    "a\nb",
    ".part-1/a",
    "\udc80",
]


def test_bad_keys_are_refused_everywhere(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    calls: list[Callable[[str], object]] = [
        store.read,
        lambda key: store.read_range(key, 0, 1),
        store.info,
        store.exists,
        lambda key: store.write(key, b""),
        lambda key: store.create(key, b""),
        lambda key: store.upload(tmp_path / "file", key),
        lambda key: store.download(key, tmp_path / "copy"),
        store.delete,
        lambda key: list(store.list(key or "..")),
        lambda key: store.delete_prefix(key or ".."),
    ]
    for key in BAD_KEYS:
        for call in calls:
            with pytest.raises(StoreError, match="use a relative path"):
                call(key)
    with pytest.raises(StoreError, match="empty segment"):
        store.write("a/", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_store_travels_by_pickle_and_by_url(store: Store) -> None:
    store.write("x", b"1")
    for copy in (pickle.loads(pickle.dumps(store)), open_store(store.url)):
        assert copy.read("x") == b"1"
        assert copy.url == store.url
