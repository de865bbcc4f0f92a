"""Locks that a killed compilation leaves behind, and locks that a live one still holds."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from ot_ray.training import extensions


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "op/lock"
    path.parent.mkdir()
    path.touch()
    return path


def _age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_stale_lock_is_removed_at_once(lock, tmp_path):
    _age(lock, extensions.STALE_SECONDS + 1)
    start = time.monotonic()
    assert extensions.prepare_extensions() == tmp_path
    assert not lock.exists() and time.monotonic() - start < 5


def test_a_fresh_lock_is_waited_for(lock):
    timer = threading.Timer(0.3, lock.unlink)
    start = time.monotonic()
    timer.start()
    extensions.prepare_extensions(poll_seconds=0.02)
    assert time.monotonic() - start >= 0.3
    timer.join()


def test_a_lock_that_nobody_releases_is_removed_when_it_gets_stale(lock, monkeypatch):
    monkeypatch.setattr(extensions, "STALE_SECONDS", 0.4)
    start = time.monotonic()
    extensions.prepare_extensions(poll_seconds=0.02)
    assert time.monotonic() - start > 0.2
    assert not lock.exists()


def test_other_files_stay(lock, tmp_path):
    _age(lock, extensions.STALE_SECONDS + 1)
    library = tmp_path / "op/op.so"
    library.write_bytes(b"code")
    _age(library, extensions.STALE_SECONDS + 1)
    extensions.prepare_extensions()
    assert library.read_bytes() == b"code"


def test_the_folder_is_the_environments_own(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "put back afterwards")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert str(extensions.prepare_extensions()) == os.path.join(sys.prefix, "torch_extensions")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == os.path.join(sys.prefix, "torch_extensions")
