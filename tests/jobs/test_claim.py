"""Of two runs of one job the one that started last writes, and the other ends by itself."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs.tuning.claim import KEY, Claim
from ot_ray.errors import LeaseLostError, StoreUnavailableError
from ot_ray.store import LocalStore

ROOT = Path(__file__).parents[2]
CHANGES = {
    "write": lambda store, path: store.write("a", b"2"),
    "create": lambda store, path: store.create("b", b"2"),
    "upload": lambda store, path: store.upload(path, "a"),
    "delete": lambda store, path: store.delete("a"),
    "delete_prefix": lambda store, path: store.delete_prefix("folder"),
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    store.write("a", b"1")
    store.write("folder/c", b"1")
    return store


@pytest.mark.parametrize("change", CHANGES)
def test_an_earlier_run_changes_nothing_any_more(change: str, store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"2")
    first = Claim(store, 0)
    guarded = first.guard(store)
    second = Claim(store, 0).guard(store)
    before = {key: store.read(key) for key in store.list()}
    with pytest.raises(LeaseLostError, match="another run of this job"):
        CHANGES[change](guarded, tmp_path / "file")
    assert {key: store.read(key) for key in store.list()} == before
    # It may read, as the one that has the claim may do everything.
    assert guarded.read("a") == b"1" and list(guarded.list("folder")) == ["folder/c"]
    CHANGES[change](second, tmp_path / "file")
    assert {key: store.read(key) for key in store.list()} != before


def test_a_run_whose_job_is_over_writes_no_more(store: LocalStore) -> None:
    guarded = Claim(store, 0).guard(store)
    guarded.write("a", b"2")
    store.delete(KEY)
    with pytest.raises(LeaseLostError):
        guarded.write("a", b"3")
    assert store.read("a") == b"2"


def test_a_claim_is_given_back_unless_another_has_it(store: LocalStore) -> None:
    with Claim(store, 0).held():
        assert store.exists(KEY)
    assert not store.exists(KEY)
    lost: list[str] = []
    with Claim(store, 0).held(look_s=3600, end=lost.append):
        Claim(store, 0)
    assert store.exists(KEY) and not lost


def test_a_store_that_is_away_ends_nothing_and_a_lost_claim_does(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, ended, away = threading.Event(), threading.Event(), store.read

    def read(key: str) -> bytes:
        looked.set()
        raise StoreUnavailableError("away")

    claim = Claim(store, 0)
    monkeypatch.setattr(store, "read", read)
    with claim.held(look_s=0.01, end=lambda reason: ended.set()):
        assert looked.wait(60) and not ended.is_set()
        Claim(store, 0)
        monkeypatch.setattr(store, "read", away)
        assert ended.wait(60)


def test_the_process_of_an_earlier_run_ends(store: LocalStore) -> None:
    code = (
        "import sys, time\nfrom jobs.tuning.claim import Claim\nfrom ot_ray.store import LocalStore\n"
        "with Claim(LocalStore(sys.argv[1]), 0).held(look_s=0.1):\n    time.sleep(3600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(store.root)], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        mark = None
        while mark is None:
            assert process.poll() is None
            mark = store.read(KEY) if store.exists(KEY) else None
        Claim(store, 0)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 1 and b"error: another run of this job has started" in said
    finally:
        process.kill()
        process.wait()
