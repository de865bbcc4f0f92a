"""Independent pieces side by side on Ray: what fails takes nothing else with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ot_ray.launch.cluster import ClusterAddress
from ot_ray.launch.devices import gpu_visibility
from ot_ray.launch.pieces import Piece, run_pieces
from tests.launch.piece_functions import after_note, note, refuse, seen_gpus, stumble, vanish

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ONE = {"CPU": 1.0}


def test_each_is_done_and_an_earlier_one_is_waited_for(local_ray: ClusterAddress, tmp_path: Path) -> None:
    place = {"place": str(tmp_path)}
    pieces = [Piece(name, note, {**place, "name": name}) for name in "abc"]
    pieces += [Piece(f"after {name}", after_note, {**place, "earlier": name}, after=(name,)) for name in "abc"]
    found: dict[str, Any] = {}
    failed = run_pieces(pieces, ONE, lambda piece, outcome: found.update({piece.name: outcome}), {"OT_RAY_TEST": "x"})
    assert failed == {}
    assert found == {**{name: name for name in "abc"}, **{f"after {name}": True for name in "abc"}}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "x")


def test_a_failure_says_why_and_takes_only_those_that_wait_for_it(local_ray: ClusterAddress, tmp_path: Path) -> None:
    place = {"place": str(tmp_path)}
    pieces = [
        Piece("wrong", refuse, {"name": "wrong"}),
        Piece("later", note, {**place, "name": "later"}, after=("wrong",)),
        Piece("broken", stumble, {}),
        Piece("gone", vanish, {}),
        Piece("well", note, {**place, "name": "well"}),
    ]
    found: list[str] = []
    failed = run_pieces(pieces, ONE, lambda piece, outcome: found.append(outcome))
    assert found == ["well"]
    assert failed.keys() == {"wrong", "later", "broken", "gone"}
    assert failed["wrong"] == failed["later"] == "wrong is no text; write text"
    assert failed["broken"] == "ZeroDivisionError: nothing to share"
    assert failed["gone"]
    assert [path.name for path in tmp_path.iterdir()] == ["well"]


def test_without_gpus_a_piece_sees_none_and_processes_are_used_again(local_ray: ClusterAddress) -> None:
    names = [f"{i}" for i in range(6)]
    # One after the other, so that one process can do them all.
    pieces = [Piece(name, seen_gpus, {}, after=tuple(names[i - 1 : i])) for i, name in enumerate(names)]
    found: list[tuple[str | None, int]] = []
    assert run_pieces(pieces, ONE, lambda piece, outcome: found.append(outcome)) == {}
    assert [hidden for hidden, _ in found] == [""] * 6
    assert len({process for _, process in found}) < 6


def test_ray_itself_shows_the_gpus_that_were_asked_for() -> None:
    assert gpu_visibility({"CPU": 1.0, "GPU": 0.5}) == {}
    assert gpu_visibility({"CPU": 1.0, "GPU": 0.0}) == gpu_visibility({}) == {"CUDA_VISIBLE_DEVICES": ""}


OUT_OF_MEMORY = """
import json, pathlib, sys, time
from ot_ray.launch import ray_cluster
from ot_ray.launch.pieces import Piece, run_pieces
from tests.launch.piece_functions import seen_gpus

pieces = [Piece("large", time.sleep, 600), Piece("later", seen_gpus, {}, after=("large",))]
with ray_cluster(num_cpus=1, dashboard=False, show_logs=False):
    failed = run_pieces(pieces, {"CPU": 1.0}, lambda piece, outcome: None)
# In a file: Ray prints what it thinks of the memory where a program prints, at a time of its own.
pathlib.Path(sys.argv[1]).write_text(json.dumps(failed))
"""


def test_a_piece_that_does_not_fit_is_given_up(tmp_path: Path) -> None:
    # To this Ray any memory in use is too much.
    full = {"RAY_memory_usage_threshold": "0.0001", "RAY_task_oom_retry_delay_base_ms": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path / "failed.json")],
        env={**environment, **full, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert failed.keys() == {"large", "later"}
    for reason in failed.values():
        assert reason.startswith("its machine ran out of memory each time that it was tried (")
        assert "exceeded threshold" in reason and "\n" not in reason
