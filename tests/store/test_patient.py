"""Stores that go away and come back: what a call does meanwhile, how often it tells, and when it gives up."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy

from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreUnavailableError
from ot_ray.store import PatientStore, Store, open_store

LONG = 240.0
"""Seconds of patience that no healthy test comes near."""


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def patient(proxied_url: str, told: list[str]) -> PatientStore:
    """A patient store behind the proxy, over one that tries each request once."""
    return PatientStore(open_store(proxied_url.replace("attempts=3", "attempts=1")), LONG, told.append)


def test_keeps_every_promise_of_the_store_behind(store: Store, tmp_path: Path) -> None:
    patient = PatientStore(store, LONG)
    (tmp_path / "in").write_bytes(b"0123456789")
    moved: list[int] = []
    patient.write("a/b", b"1")
    patient.create("a/c", b"2")
    patient.upload(tmp_path / "in", "a/d", moved.append)
    patient.download("a/d", tmp_path / "out", progress=moved.append)
    assert (tmp_path / "out").read_bytes() == b"0123456789" and sum(moved) == 20
    assert patient.read("a/b") == b"1" and patient.read_range("a/d", 2, 4) == b"23"
    assert patient.info("a/d").size == 10 and patient.exists("a/c") and not patient.exists("a/x")
    assert list(patient.list("a")) == ["a/b", "a/c", "a/d"]
    with pytest.raises(AlreadyExistsError):
        patient.create("a/c", b"2")
    with pytest.raises(NotFoundError):
        patient.read("a/x")
    patient.delete("a/b")
    patient.delete_prefix("a")
    assert list(patient.list()) == []
    copy = pickle.loads(pickle.dumps(patient))
    assert isinstance(copy, PatientStore) and copy.url == patient.url == store.url


def test_every_call_outlasts_a_store_that_is_away(
    patient: PatientStore, proxy: FaultyProxy, told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "in").write_bytes(b"0123456789")
    calls: list[tuple[Callable[[], object], object]] = [
        (lambda: patient.write("x", b"12"), None),
        (lambda: patient.read("x"), b"12"),
        (lambda: patient.read_range("x", 1, 2), b"2"),
        (lambda: patient.info("x").size, 2),
        (lambda: patient.exists("x"), True),
        (lambda: patient.create("y", b""), None),
        (lambda: patient.upload(tmp_path / "in", "z").size, 10),
        (lambda: patient.download("z", tmp_path / "out"), None),
        (lambda: list(patient.list()), ["x", "y", "z"]),
        (lambda: patient.delete("x"), None),
        (lambda: patient.delete_prefix("y"), None),
    ]
    for call, answer in calls:
        told.clear()
        proxy.faults.extend([503, 503])
        assert call() == answer
        assert not proxy.faults
        assert len(told) == 2, told
        assert re.search(r"waiting for it, 0 of 240 s so far", told[0])
        assert "answers again" in told[1]
    assert (tmp_path / "out").read_bytes() == b"0123456789"


def test_bytes_that_are_sent_again_are_counted_once(patient: PatientStore, proxy: FaultyProxy, tmp_path: Path) -> None:
    data = bytes(range(256)) * 256 * 16 * 12  # three parts
    (tmp_path / "in").write_bytes(data)
    proxy.faults.extend(["pass", "pass", "pass", 503])  # after the start and two parts
    moved: list[int] = []
    patient.upload(tmp_path / "in", "big", moved.append)
    assert patient.read("big") == data
    assert sum(moved) == len(data)
    assert sum(seen.method == "POST" and seen.path.endswith("uploads") for seen in proxy.seen) == 2


def test_a_create_whose_answer_was_lost_is_ours(patient: PatientStore, proxy: FaultyProxy) -> None:
    proxy.faults.append("lose")
    patient.create("v1", b"mine")
    assert patient.read("v1") == b"mine"
    proxy.faults.append("lose")
    with pytest.raises(AlreadyExistsError, match="v1"):
        patient.create("v1", b"theirs")
    with pytest.raises(AlreadyExistsError, match="v1"):
        patient.create("v1", b"mine")


def test_patience_ends_with_the_time_waited(proxied_url: str, proxy: FaultyProxy, told: list[str]) -> None:
    impatient = PatientStore(open_store(proxied_url.replace("attempts=3", "attempts=1")), 1.2, told.append)
    proxy.forever = 503
    with pytest.raises(StoreUnavailableError, match=r"cannot read .*some/key.*gave up after \d+ s of waiting"):
        impatient.read("some/key")
    # 0.25, 0.5 and the rest of the time between them.
    assert len(proxy.seen) >= 2 and len(told) == 1


def test_whoever_waits_can_be_called_off(patient: PatientStore, proxy: FaultyProxy, told: list[str]) -> None:
    proxy.forever = 503
    failures: list[BaseException] = []

    def work() -> None:
        try:
            patient.read("x")
        except StoreUnavailableError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not told and thread.is_alive():
        thread.join(0.01)
    patient.abandon()
    thread.join(LONG / 4)
    assert not thread.is_alive() and "gave up" in str(failures[0])


def test_a_minute_passes_between_two_words(
    patient: PatientStore, proxy: FaultyProxy, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ot_ray.store.patient._TELL_EVERY", 0.3)
    proxy.faults.extend([503] * 4)  # waits of 0.25, 0.5, 1 and 2 seconds
    assert not patient.exists("x")
    assert 4 <= len(told) <= 5, told
    assert all("so far" in line for line in told[:-1]) and "answers again" in told[-1]
