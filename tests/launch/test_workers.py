"""Worker groups under Ray Train: results, errors that arrive as themselves, and what is tried again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ot_ray.config import load
from ot_ray.errors import ConfigError, LaunchError, TrainingError
from ot_ray.launch import WorkerGroup, run_workers
from ot_ray.launch.cluster import ClusterAddress
from tests.launch.worker_functions import collateral_error, foreign_error, our_error, sum_of_ranks

# A group takes fifteen seconds to start, and many times that on a machine with other things to do.
pytestmark = pytest.mark.timeout(560)

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def run(local_ray: ClusterAddress, tmp_path: Path, told: list[str]) -> Run:
    """Runs a function on a group of two, whose records lie in the test's own folder."""

    def run(function: Callable[..., Any], payload: dict[str, Any], max_failures: int = 0) -> dict[str, Any]:
        group = WorkerGroup(count=2, max_failures=max_failures, ray_storage=str(tmp_path / "ray"))
        # On a busy machine the run may also tell that it waits.
        return run_workers(function, payload, group, function.__name__, _restarts(told))

    return run


def _restarts(told: list[str]) -> Callable[[str], None]:
    return lambda text: told.append(text) if "starting again" in text else None


@pytest.mark.slow
def test_rank_0_s_value_comes_back_and_nothing_stays_behind(run: Run, told: list[str]) -> None:
    before = dict(os.environ)
    assert run(sum_of_ranks, {"offset": 10}) == {"rank": 0, "world_size": 2, "sum": 21.0}
    assert dict(os.environ) == before
    assert told == []


@pytest.mark.slow
def test_our_own_error_arrives_as_itself_and_is_not_tried_again(run: Run, told: list[str], tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run(our_error, {"rank": 1, "seen": str(tmp_path / "seen")}, max_failures=3)
    assert type(caught.value) is TrainingError
    assert str(caught.value) == "the loss became nan at step 7; lower training.lr"
    assert (tmp_path / "seen").read_text() == "x"
    assert told == []


@pytest.mark.slow
def test_another_error_is_tried_again_and_then_a_launch_error(run: Run, told: list[str], tmp_path: Path) -> None:
    expected = r"run foreign_error failed: .*ValueError: not our tree: odd \(failure 2; workers.max_failures is 1\)"
    with pytest.raises(LaunchError, match=expected):
        run(foreign_error, {"word": "odd", "seen": str(tmp_path / "seen")}, max_failures=1)
    assert (tmp_path / "seen").read_text() == "xx"
    assert told == ["ValueError: not our tree: odd; starting again from the last checkpoint (failure 1 of 1)"]


@pytest.mark.slow
def test_what_a_worker_raises_because_another_died_does_not_hide_it(run: Run, told: list[str], tmp_path: Path) -> None:
    result = run(collateral_error, {"died": str(tmp_path / "died")}, max_failures=1)
    assert result == {"life": 2}
    assert len(told) == 1
    assert told[0].startswith("a worker died: ")
    assert told[0].endswith("starting again from the last checkpoint (failure 1 of 1)")


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["/proc/nowhere", "nonsense://place"])
def test_a_place_for_ray_s_records_that_is_none_is_named(local_ray: ClusterAddress, storage: str) -> None:
    group = WorkerGroup(count=1, ray_storage=storage)
    with pytest.raises(LaunchError, match=rf"workers\.ray_storage is '{storage}', which Ray Train cannot write to: "):
        run_workers(sum_of_ranks, {"offset": 0}, group, "nowhere")


def test_count_is_a_number_or_a_range() -> None:
    fixed, elastic = WorkerGroup(count=3), load(WorkerGroup, overrides=["count=[1,4]"])
    assert (fixed.fewest, fixed.most) == (3, 3)
    assert (elastic.fewest, elastic.most, elastic.count) == (1, 4, (1, 4))
    assert WorkerGroup.model_validate_json(elastic.model_dump_json()) == elastic
    assert WorkerGroup(cpus=2, gpus=1).resources == {"CPU": 2.0, "GPU": 1.0}
    assert WorkerGroup().resources == {"CPU": 1.0}


@pytest.mark.parametrize("count", ["0", "[0, 2]", "[3, 2]", "-1"])
def test_a_range_upside_down_is_refused(count: str) -> None:
    with pytest.raises(ConfigError, match=r"count is .*: workers start at 1, and the fewest are no more than the most"):
        load(WorkerGroup, overrides=[f"count={count}"])


@pytest.mark.parametrize("count", ["[2]", "[1, 2, 3]", "two", "1.5", "true", "[1, 2.5]", "[]"])
def test_anything_else_is_refused_in_words(count: str) -> None:
    with pytest.raises(ConfigError, match=r"count is .*: write a whole number, or \[fewest, most\]"):
        load(WorkerGroup, overrides=[f"count={count}"])


@pytest.mark.parametrize("field", ["cpus", "start_timeout_s", "resize_interval_s"])
def test_nothing_of_a_worker_is_nought(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        WorkerGroup.model_validate({field: 0})
