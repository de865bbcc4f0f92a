"""What only a folder does: hard links between processes, full disks, paths that are files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from ot_ray.errors import AlreadyExistsError, StoreError, StoreUnavailableError
from ot_ray.store import LocalStore
from ot_ray.store.partial import disk_errors

FULL_DISK = """
import sys
from pathlib import Path
from ot_ray.errors import StoreFullError
from ot_ray.store import LocalStore

disk, roomy = Path(sys.argv[1]), LocalStore(sys.argv[2])
store, big = LocalStore(disk), bytes(2 * 1024 * 1024)
store.write("kept", b"old")
roomy.write("big", big)
attempts = [
    lambda: store.write("kept", big),
    lambda: store.create("new", big),
    lambda: store.upload(roomy.root / "big", "new"),
    lambda: roomy.download("big", disk / "copy"),
]
for attempt in attempts:
    try:
        attempt()
    except StoreFullError as error:
        assert "free some space" in str(error), error
    else:
        raise SystemExit("2 MiB fitted on a disk of 1 MiB")
    assert [path.name for path in disk.iterdir()] == ["kept"], list(disk.iterdir())
assert store.read("kept") == b"old"
store.write("small", b"fits")
"""


def create(root: str, me: int) -> int | None:
    try:
        LocalStore(root).create("deep/folder/version", b"%d" % me)
    except AlreadyExistsError:
        return None
    return me


@pytest.mark.slow
def test_one_of_racing_processes_creates(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        winners = [me for me in pool.map(create, [str(tmp_path)] * 40, range(40)) if me is not None]
    assert [b"%d" % me for me in winners] == [LocalStore(tmp_path).read("deep/folder/version")]


def test_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    disk, roomy = tmp_path / "disk", tmp_path / "roomy"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1" "$4"'
    try:
        command = ["unshare", "-rm", "sh", "-c", script, "sh", disk, sys.executable, FULL_DISK, roomy]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("unshare is not installed, so no small disk can be mounted")
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"this kernel lets no user mount a small disk: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr


def test_key_is_an_object_or_a_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a/b", b"1")
    for key in ("a", "a/b/c", "a/b/c/d"):
        with pytest.raises(StoreError, match="choose another key"):
            store.write(key, b"2")
    assert list(store.list()) == ["a/b"]


def test_unfinished_files_show_nowhere(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / ".part-1").write_bytes(b"")
    (tmp_path / ".part-2").mkdir()
    (tmp_path / ".part-2" / "x").write_bytes(b"")
    assert list(store.list()) == []


def test_url_quotes_what_a_url_cannot_hold(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a b#c?d%20é")
    assert store.url.startswith("file:///")
    assert not set(store.url) & set(" #?é")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT])
def test_a_network_folder_that_is_away_counts_as_unavailable(number: int) -> None:
    with (
        pytest.raises(StoreUnavailableError, match=r"cannot read x: .*; check the network folder"),
        disk_errors("cannot read x"),
    ):
        raise OSError(number, os.strerror(number))
