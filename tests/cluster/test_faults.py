"""Runs on a real cluster that loses a worker, a machine or its driver end with the losses of one undisturbed
process. Every scene is a program of its own; see scene.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.stage import Play, stage
from tests.cluster.work import EVERY, STEPS, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(960)]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    with stage("tests.cluster.scene", tmp_path) as play:
        yield play


def test_a_killed_worker_changes_no_loss(play: Play, tmp_path: Path) -> None:
    result = play("kill_worker")
    assert result["workers"] == 2
    # The checkpoint of step 4 was being written when the worker died.
    assert result["first"] in (3, 5)
    assert len(result["restarts"]) == 1
    assert result["restarts"][0].endswith("starting again from the last checkpoint (failure 1 of 1)")
    _check_losses(tmp_path, undisturbed())


def test_a_group_shrinks_and_grows_with_its_machines(play: Play, tmp_path: Path) -> None:
    result = play("lose_machine")
    assert (tmp_path / "attempts").read_text().split() == ["2", "1", "2"]
    assert result["restarts"] == ["a machine was lost; starting again from the last checkpoint"]
    assert result["first"] in (7, 9)
    _check_losses(tmp_path, undisturbed())


def test_a_run_whose_driver_was_killed_goes_on(play: Play, tmp_path: Path) -> None:
    result = play("kill_driver")
    assert result["first"] in (5, 7)
    assert result["restarts"] == []
    _check_losses(tmp_path, undisturbed())


def _check_losses(folder: Path, expected: list[float]) -> None:
    found: dict[int, list[float]] = {}
    for line in map(json.loads, (folder / "figures.jsonl").read_text().splitlines()):
        found.setdefault(line["step"], []).append(line["loss"])
    assert sorted(found) == list(range(1, STEPS + 1))
    # Steps that were done twice, for want of a checkpoint, came to the same.
    assert max(len(losses) for losses in found.values()) <= 1 + STEPS // EVERY
    for step, losses in found.items():
        assert losses == pytest.approx([expected[step - 1]] * len(losses), rel=1e-4)
    assert len(set(expected)) == STEPS
