"""Runs on a real cluster that loses a worker, a machine or its driver end with the losses of one undisturbed
process. Every scene is a program of its own; see scene.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.work import EVERY, STEPS, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(560)]

ROOT = Path(__file__).parents[2]
Play = Callable[[str], dict[str, Any]]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Plays a scene and returns its `result.json`; whatever it started is dead afterwards."""
    # Ray's sockets lie below it, and their paths may have 107 characters.
    place = tempfile.mkdtemp(prefix="ot", dir="/tmp")

    def play(name: str) -> dict[str, Any]:
        with (tmp_path / "output").open("w+") as output:
            scene = [sys.executable, "-m", "tests.cluster.scene", name, str(tmp_path)]
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = subprocess.run(
                    scene, cwd=ROOT, env=_environment(place), stdout=output, stderr=subprocess.STDOUT, timeout=500
                ).returncode
            output.seek(0)
            assert code == 0, f"the scene {'took too long' if code is None else 'failed'}:\n{output.read()}"
        return json.loads((tmp_path / "result.json").read_text())

    try:
        yield play
    finally:
        _kill_everything_below(place)
        shutil.rmtree(place, ignore_errors=True)


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


def _environment(place: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": place,
        # A dead machine is noticed within seconds; a busy one still has ten for each answer.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


def _kill_everything_below(place: str) -> None:
    mark = f"RAY_TMPDIR={place}".encode()
    deadline = time.monotonic() + 30
    while pids := [pid for pid in _processes() if mark in _setting(pid)]:
        assert time.monotonic() < deadline, f"processes {pids} do not end"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _setting(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []
