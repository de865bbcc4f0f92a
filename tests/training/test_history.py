"""The history of a run that was interrupted is that of one that was not."""

from __future__ import annotations

import json

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


def test_the_joined_history_lies_in_the_store(tmp_path):
    store = LocalStore(str(tmp_path))
    killed = RunHistory(store, "night", every=2)
    for step in (1, 2, 3):
        killed.add({"step": step, "loss": 1.0 / step})
    resumed = RunHistory(store, "night", every=2)
    for step in (3, 4):
        resumed.add({"step": step, "loss": 1.0 / step})
    joined = resumed.close(write=True)
    assert [entry["step"] for entry in joined] == [1, 2, 3, 4] and joined[2]["resumed"]
    kept = [json.loads(line) for line in store.read("runs/night/history.jsonl").decode().splitlines()]
    assert kept == joined


def test_other_ranks_write_nothing(tmp_path):
    store = LocalStore(str(tmp_path))
    history = RunHistory(store, "night", every=0)
    history.add({"step": 1, "loss": 1.0})
    assert history.close(write=False) == [{"step": 1, "loss": 1.0}]
    assert list(store.list()) == []
