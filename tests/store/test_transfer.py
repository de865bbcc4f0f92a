"""Folders up and down: the manifest last and once, no half-written folder."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy

from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError, StoreUnavailableError
from ot_ray.store import LocalStore, Store, download_folder, open_store, upload_folder

FILES = {"weights.bin": b"w" * 1000, "manifest.json": b"{}", "sub/dir/z.txt": b"z", "a b&c.txt": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "in", FILES)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prefix", ["", "bundles/opt/1/"])
def test_round_trip(store: Store, folder: Path, tmp_path: Path, prefix: str) -> None:
    moved: list[int] = []
    done = upload_folder(store, folder, prefix, "manifest.json", moved.append)
    names = [info.key.removeprefix(prefix) for info in done]
    assert names == ["a b&c.txt", "sub/dir/z.txt", "weights.bin", "manifest.json"]
    assert [info.sha256 for info in done] == [hashlib.sha256(FILES[name]).hexdigest() for name in names]
    download_folder(store, prefix, tmp_path / "deep" / "out", moved.append)
    assert contents(tmp_path / "deep" / "out") == FILES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert sum(moved) == 2 * sum(map(len, FILES.values()))


def test_published_version_is_never_touched(store: Store, folder: Path, tmp_path: Path) -> None:
    upload_folder(store, folder, "v1", "manifest.json")
    other = write(tmp_path / "other", {"weights.bin": b"other", "manifest.json": b"other"})
    with pytest.raises(AlreadyExistsError, match="another version"):
        upload_folder(store, other, "v1", "manifest.json")
    assert store.read("v1/weights.bin") == FILES["weights.bin"]
    assert store.read("v1/manifest.json") == b"{}"


def test_without_a_last_file_every_file_is_replaced(store: Store, folder: Path) -> None:
    upload_folder(store, folder, "v1")
    (folder / "manifest.json").write_bytes(b"newer")
    upload_folder(store, folder, "v1")
    assert store.read("v1/manifest.json") == b"newer"


def test_one_of_two_racing_publishers_wins(store: Store, folder: Path) -> None:
    gate, outcomes = threading.Barrier(4), []

    def publish() -> None:
        gate.wait()
        try:
            upload_folder(store, folder, "v1", "manifest.json")
            outcomes.append("won")
        except AlreadyExistsError:
            outcomes.append("lost")

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]


def test_broken_upload_shows_no_manifest_and_can_be_repeated(
    proxy: FaultyProxy, proxied_url: str, folder: Path
) -> None:
    store = open_store(proxied_url)
    store.exists("warm")
    proxy.method = "PUT"
    proxy.faults.extend(["pass", "pass"])
    proxy.forever = 503
    with pytest.raises(StoreUnavailableError):
        upload_folder(store, folder, "v1", "manifest.json")
    assert list(store.list("v1")) == ["v1/a b&c.txt", "v1/sub/dir/z.txt"]
    proxy.forever = None
    upload_folder(store, folder, "v1", "manifest.json")
    assert store.read("v1/weights.bin") == FILES["weights.bin"]


def test_broken_download_leaves_no_folder(proxy: FaultyProxy, proxied_url: str, folder: Path, tmp_path: Path) -> None:
    store = open_store(proxied_url)
    upload_folder(store, folder, "v1")
    proxy.method = "HEAD"
    proxy.faults.append("pass")
    proxy.forever = 503
    with pytest.raises(StoreUnavailableError):
        download_folder(store, "v1", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_download_never_merges_into_a_folder_in_use(store: Store, folder: Path, tmp_path: Path) -> None:
    upload_folder(store, folder, "v1")
    (tmp_path / "empty").mkdir()
    download_folder(store, "v1", tmp_path / "empty")
    assert contents(tmp_path / "empty") == FILES
    write(tmp_path / "used", {"mine": b"1"})
    for used in (tmp_path / "used", tmp_path / "used" / "mine"):
        with pytest.raises(AlreadyExistsError, match="choose another folder"):
            download_folder(store, "v1", used)
    assert contents(tmp_path / "used") == {"mine": b"1"}


def test_nothing_to_move(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="v9"):
        download_folder(store, "v9", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotFoundError, match="nowhere"):
        upload_folder(store, tmp_path / "nowhere", "v1")
    with pytest.raises(NotFoundError, match=r"manifest\.json"):
        upload_folder(store, write(tmp_path / "in", {"x": b""}), "v1", "manifest.json")
    assert list(store.list()) == []


def test_hostile_keys_in_a_bucket_do_not_leave_the_folder(s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    store._connect().put_object(Bucket=store.address.bucket, Key="root/v1/../../../evil", Body=b"x")  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"evil.*'\.\.'"):
        download_folder(store, "v1", tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path).rglob("*") if path.is_file()] == []


def test_links_to_files_are_followed_and_others_refused(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs", {"1": b"blob"}) / "1"
    store, folder = LocalStore(tmp_path / "store"), tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.bin").symlink_to(blob)
    upload_folder(store, folder, "v1")
    assert store.read("v1/model.bin") == b"blob"
    (folder / "link").symlink_to(tmp_path / "blobs", target_is_directory=True)
    with pytest.raises(StoreError, match="link"):
        upload_folder(store, folder, "v2")
    (folder / "link").unlink()
    os.symlink(tmp_path / "gone", folder / "link")
    with pytest.raises(StoreError, match="broken link"):
        upload_folder(store, folder, "v2")
    assert list(store.list("v2")) == []
