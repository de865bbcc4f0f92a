"""The learning-rate search under Ray Tune: who wins, who is stopped, who fails and why, and what stays behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from ot_ray.config import load
from ot_ray.errors import ConfigError, LaunchError, TrainingError
from ot_ray.launch import SearchConfig, search_rates
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.launch.trials import Keeper
from tests.launch.trial_functions import failing, falling, seen_gpus, told_losses

ROOT = Path(__file__).parents[2]
# A trial's process takes ten seconds to start, and many times that on a machine with other things to do.
pytestmark = pytest.mark.timeout(560)

# One at a time the trials come in the order of their rates, so that who is stopped is known.
IN_ORDER = {"max_concurrent": 1}


def state_of_this_process():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    return dict(os.environ), handlers, logging.getLogger("ray.tune").level, Path.cwd()


@pytest.mark.slow
def test_the_best_rate_wins_with_what_its_own_trial_made(
    local_ray: ClusterAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    curves = {
        1e-5: [3.0, 2.9, 2.8, 2.7],
        # Equal in the end to the next: the smaller rate is taken.
        1e-4: [2.5, 2.0, 1.5, 1.0],
        2e-4: [2.4, 1.9, 1.4, 1.0],
        # Behind all others at the grace steps, and the best if it were let go on.
        3e-4: [9.0, 8.0, 7.0, 0.1],
    }
    monkeypatch.setenv("HOME", str(tmp_path))
    before = state_of_this_process()
    config = SearchConfig(rates=tuple(reversed(curves)), grace_steps=3, **IN_ORDER)
    payload = {"curves": curves, "weights": torch.arange(3.0)}
    shown = []
    found = search_rates(
        told_losses, payload, config, 8, show=lambda trials: shown.append(sum(trial.step for trial in trials))
    )

    assert [(trial.rate, trial.status, trial.step) for trial in found.trials] == [
        (1e-5, "completed", 8),
        (1e-4, "completed", 8),
        (2e-4, "completed", 8),
        (3e-4, "stopped", 4),
    ]
    assert found.winner is found.trials[1]
    assert found.outcome["rate"] == 1e-4
    assert torch.equal(found.outcome["weights"], payload["weights"] * 1e-4)
    assert found.trials[0].curve == [
        {"step": 2, "validation_loss": 3.0, "training_loss": 1.5},
        {"step": 4, "validation_loss": 2.9, "training_loss": 3.5},
        {"step": 6, "validation_loss": 2.8, "training_loss": 5.5},
        {"step": 8, "validation_loss": 2.7, "training_loss": 7.5},
    ]
    assert [point["validation_loss"] for point in found.trials[3].curve] == [9.0, 8.0]
    assert shown == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28]
    said = json.loads(json.dumps(found.as_dict()))
    assert said["winner"] == {"rate": 1e-4, "validation_loss": 1.0}
    assert said["trials"][3] == {
        "rate": 3e-4,
        "status": "stopped",
        "step": 4,
        "curve": found.trials[3].curve,
    }
    assert state_of_this_process() == before
    assert list(tmp_path.iterdir()) == []
    # Nothing of Ray Tune's own tables, wherever it printed them.
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
def test_trials_that_fail_are_named_and_one_that_does_not_wins(local_ray: ClusterAddress) -> None:
    how = {2e-5: "ours", 5e-5: "foreign", 1e-4: "killed", 2e-4: "nan", 4e-4: "unmeasured"}
    config = SearchConfig(rates=(*how, 3e-4), grace_steps=4)
    found = search_rates(failing, how, config, 4)
    assert (found.winner.rate, found.outcome) == (3e-4, "made")
    assert {trial.rate: trial.status for trial in found.trials} == {**dict.fromkeys(how, "failed"), 3e-4: "completed"}
    reasons = {trial.rate: trial.reason or "" for trial in found.trials}
    assert reasons[2e-5] == "the loss became nan at step 2; lower training.lr"
    assert reasons[5e-5] == "ValueError: odd"
    assert "its worker process has died" in reasons[1e-4] and "\n" not in reasons[1e-4]
    assert reasons[2e-4] == "the validation loss became nan at step 2"
    assert reasons[4e-4] == "the validation loss of step 4, the last, was not measured"
    assert [trial.step for trial in found.trials] == [1, 1, 1, 1, 4, 3]
    assert json.loads(json.dumps(found.as_dict()))["trials"][0]["reason"] == reasons[2e-5]


@pytest.mark.slow
def test_a_search_in_which_every_trial_fails_says_why_each_did(local_ray: ClusterAddress) -> None:
    config = SearchConfig(rates=(2e-5, 2e-4), grace_steps=4)
    with pytest.raises(TrainingError) as caught:
        search_rates(failing, {2e-5: "foreign", 2e-4: "nan"}, config, 4)
    assert str(caught.value) == (
        "every trial of the learning-rate search failed (2e-05: ValueError: odd; 0.0002: the validation loss became "
        "nan at step 2); mend that, or lower search.rates"
    )


@pytest.mark.slow
def test_a_search_whose_survivor_dies_tells_who_was_stopped(local_ray: ClusterAddress) -> None:
    losses = {1e-4: [1.0, 1.0], 2e-4: [3.0, 3.0, 3.0], 3e-4: [2.5, 2.5, 2.5]}
    config = SearchConfig(rates=tuple(losses), grace_steps=2, **IN_ORDER)
    with pytest.raises(TrainingError) as caught:
        search_rates(falling, losses, config, 4)
    assert str(caught.value) == (
        "no trial of the learning-rate search finished: 1 failed (0.0001: the disk is full; make room), and the other "
        "2 had been stopped early for being behind; the best of these is 0.0003, at step 2 with a validation loss of "
        "2.5; mend the failure, or try that rate alone by search.rates=[0.0003]"
    )


@pytest.mark.slow
def test_without_gpus_a_trial_sees_none(local_ray: ClusterAddress) -> None:
    assert search_rates(seen_gpus, None, SearchConfig(rates=(1e-4,)), 1).outcome == ""


@pytest.mark.slow
def test_trials_that_find_no_room_are_given_up(local_ray: ClusterAddress) -> None:
    before = state_of_this_process()
    config = SearchConfig(rates=(1e-4,), cpus=1000, start_timeout_s=2)
    expected = r"no trial of the search started for 2 s; each needs 1000 CPU \(search.cpus, search.gpus\): add machines"
    with pytest.raises(LaunchError, match=expected):
        search_rates(told_losses, {}, config, 4)
    assert state_of_this_process() == before


INTERRUPTED = """
import sys
from ot_ray.launch import SearchConfig, ray_cluster, search_rates
from tests.launch.trial_functions import endless

with ray_cluster(num_cpus=2, dashboard=False, show_logs=False):
    search_rates(endless, {"marks": sys.argv[1]}, SearchConfig(rates=(1e-4, 2e-4, 3e-4)), 10)
"""


@pytest.fixture
def ray_place() -> Iterator[Path]:
    """A folder for the records that Ray itself keeps; its sockets want a short path."""
    place = tempfile.mkdtemp(dir="/tmp")
    yield Path(place)
    shutil.rmtree(place)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, ray_place: Path) -> None:
    places = {name: tmp_path / name for name in ("marks", "home", "temporary")}
    for place in places.values():
        place.mkdir()
    environment = {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["temporary"]),
        "RAY_TMPDIR": str(ray_place),
        "PYTHONPATH": str(ROOT),
    }
    search = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(places["marks"])],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As a terminal has it: Ctrl-C goes to the group, not to the session that runs the tests.
        start_new_session=True,
    )
    started = []
    try:
        _until(lambda: len(list(places["marks"].iterdir())) == 2 or search.poll() is not None, 300)
        assert search.poll() is None, search.communicate()[0]
        started = psutil.Process(search.pid).children(recursive=True)
        assert {int(mark.name) for mark in places["marks"].iterdir()} <= {process.pid for process in started}
        search.send_signal(signal.SIGINT)
        said, _ = search.communicate(timeout=120)
        assert said.strip().splitlines()[-1] == "KeyboardInterrupt"
        assert psutil.wait_procs(started, timeout=60)[1] == []
    finally:
        for process in [*started, search]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        search.wait()
    assert list(places["home"].iterdir()) == []
    assert list(places["temporary"].iterdir()) == []


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def test_the_keeper_has_the_best_of_all_orders() -> None:
    offers = [(2.0, 1e-5), (1.0, 3e-4), (1.0, 1e-4), (1.5, 2e-5)]
    for shift in range(len(offers)):
        keeper = Keeper()
        assert keeper.best() is None
        for loss, rate in offers[shift:] + offers[:shift]:
            keeper.keep(loss, rate, f"of {rate}")
        assert keeper.best() == (1e-4, "of 0.0001")
        assert not keeper.wants(1.0, 3e-4)
        assert keeper.wants(1.0, 5e-5)


def test_the_rates_of_the_paper_are_the_default() -> None:
    assert SearchConfig().rates == (2e-5, 5e-5, 1e-4, 2e-4, 3e-4)
    assert SearchConfig().resources == {"CPU": 1.0}
    assert SearchConfig(cpus=2, gpus=0.5).resources == {"CPU": 2.0, "GPU": 0.5}
    assert load(SearchConfig, overrides=["rates=[1e-3, 1e-4]"]).rates == (1e-4, 1e-3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rates=[]", "rates is"),
        ("rates=[0.1, 0]", r"rates is .*: a learning rate must be above 0"),
        ("rates=[0.1, 1e-1]", r"rates is .*: name each learning rate once"),
        ("rates=[.nan]", r"rates\.0 is nan"),
        ("grace_steps=0", "grace_steps is 0"),
        ("reduction_factor=1", "reduction_factor is 1"),
        ("max_concurrent=0", "max_concurrent is 0"),
        ("cpus=0", "cpus is 0"),
        ("gpus=-1", "gpus is -1"),
        ("rate=[0.1]", "unknown key rate; did you mean rates?"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(SearchConfig, overrides=[override])
