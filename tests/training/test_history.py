"""The history of a run that was interrupted is that of one that was not."""

from __future__ import annotations

import json
import time

import pytest

from ot_ray.errors import StoreUnavailableError
from ot_ray.store import LocalStore
from ot_ray.training.history import RunHistory, join


def _lines(*steps: int, by: str) -> str:
    return "".join(json.dumps({"step": step, "by": by}) + "\n" for step in steps)


def test_a_step_done_twice_counts_as_the_later_process_has_it():
    joined = join([_lines(1, 2, 3, by="a"), _lines(3, 4, by="b")])
    assert [(entry["step"], entry["by"]) for entry in joined] == [(1, "a"), (2, "a"), (3, "b"), (4, "b")]
    assert [entry["step"] for entry in joined if entry.get("resumed")] == [3]


def test_what_a_killed_process_did_after_its_checkpoint_is_forgotten():
    joined = join([_lines(1, 2, 3, 4, 5, by="a"), _lines(3, by="b")])
    assert [(entry["step"], entry["by"]) for entry in joined] == [(1, "a"), (2, "a"), (3, "b")]


def test_a_run_started_anew_at_its_first_step_is_not_called_resumed():
    assert join([_lines(1, 2, by="a")]) == [{"step": 1, "by": "a"}, {"step": 2, "by": "a"}]


def _run(store, steps, every=2, loss=1.0):
    history = RunHistory(store, "night", every)
    for step in steps:
        history.add({"step": step, "loss": loss})
    return history


def _until_written(store, key):
    deadline = time.monotonic() + 60
    while not store.exists(key):
        assert time.monotonic() < deadline, f"{key} was never written"
        time.sleep(0.01)


def test_the_joined_history_lies_in_the_store(tmp_path):
    store = LocalStore(str(tmp_path))
    _run(store, [1, 2, 3])
    _until_written(store, "runs/night/history/from-00000001.jsonl")
    joined = _run(store, [3, 4]).close()
    assert [entry["step"] for entry in joined] == [1, 2, 3, 4] and joined[2]["resumed"]
    kept = [json.loads(line) for line in store.read("runs/night/history.jsonl").decode().splitlines()]
    assert kept == joined


def test_what_followed_a_checkpoint_that_was_given_up_is_forgotten(tmp_path):
    store = LocalStore(str(tmp_path))
    for first, last in ((1, 10), (11, 15), (16, 20)):
        _run(store, range(first, last + 1), every=0).close()
    joined = _run(store, range(11, 31), every=0, loss=2.0).close()
    assert [entry["step"] for entry in joined] == list(range(1, 31))
    assert [entry["loss"] for entry in joined] == [1.0] * 10 + [2.0] * 20


def test_a_store_that_is_away_stops_no_step(tmp_path):
    class Away(LocalStore):
        def write(self, key, data):
            raise StoreUnavailableError("away")

    history = _run(Away(str(tmp_path)), [1, 2, 3, 4])
    with pytest.raises(StoreUnavailableError):
        history.close()


def test_without_checkpoints_nothing_is_written_before_the_end(tmp_path):
    store = LocalStore(str(tmp_path))
    history = _run(store, [1, 2], every=0)
    assert list(store.list()) == []
    assert history.close() == history.steps
