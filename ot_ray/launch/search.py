"""Search for a learning rate: what is tried, and what came of each rate.

The trials themselves, as Ray Tune runs them, are trials.py's; what a trial does is handed in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, field_validator

from ot_ray.config import Config
from ot_ray.errors import LaunchError, MissingDependencyError, TrainingError
from ot_ray.launch.attendance import tell_on_stderr

RATES = (2e-5, 5e-5, 1e-4, 2e-4, 3e-4)
"""The rates that the paper tries (its section 4.1)."""

Report = Callable[[Mapping[str, float]], None]
TrialFunction = Callable[[Any, float, Report], Any]
"""Takes the payload, a learning rate, and a function to call after each step; returns what the winner is to yield.
Each call gives that step's `step` and `loss`, and `validation_loss` where it was measured, as after the last step."""


class SearchConfig(Config):
    """Several learning rates, each tried in a Ray Tune trial of its own."""

    rates: tuple[float, ...] = Field(default=RATES, min_length=1)
    """The learning rates, each in place of `training.lr`."""
    grace_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps that every trial is given before it may be stopped; unset, a quarter of its steps."""
    reduction_factor: float = Field(default=2.0, gt=1)
    """At the grace steps, and each time that the steps have grown by this factor, a trial goes on if it is among
    the best one in this many of those that have come as far (ASHA)."""
    cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs of a trial."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of a trial."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; unset, as many as the cluster has room for."""
    address: str | None = None
    """Ray cluster of the trials; unset, the one this runs in, or else a local one."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for the cluster to have room for a first trial."""
    report: str | None = None
    """Folder for `search.json` and `search.png`, the curves of all trials."""

    @field_validator("rates")
    @classmethod
    def _each_once(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if any(rate <= 0 for rate in rates):
            raise ValueError("a learning rate must be above 0")
        if len(set(rates)) < len(rates):
            raise ValueError("name each learning rate once")
        return tuple(sorted(rates))

    @property
    def resources(self) -> dict[str, float]:
        """What one trial needs, as Ray counts it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass
class Trial:
    """What became of one learning rate."""

    rate: float
    status: Literal["completed", "stopped", "failed"] = "failed"
    """`stopped` early because it was behind others; a trial that diverged or died has `failed`."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """`step`, `validation_loss`, and `training_loss`, the mean since the point before; losses in nats a token."""
    reason: str | None = None
    """Why it failed."""

    @property
    def step(self) -> int:
        """The last step that was evaluated; 0 if there was none."""
        return int(self.curve[-1]["step"]) if self.curve else 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values: dict[str, Any] = {"rate": self.rate, "status": self.status, "step": self.step, "curve": self.curve}
        return {**values, "reason": self.reason} if self.reason is not None else values


@dataclass(frozen=True)
class Found:
    """What a search leaves behind."""

    trials: list[Trial]
    """One for each rate, rising."""
    winner: Trial
    """The completed trial with the lowest validation loss in the end; of equal ones, the smaller rate."""
    outcome: Any
    """What the winner's function returned."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, without the outcome."""
        return {
            "winner": {"rate": self.winner.rate, "validation_loss": self.winner.curve[-1]["validation_loss"]},
            "trials": [trial.as_dict() for trial in self.trials],
        }


def search_rates(
    function: TrialFunction,
    payload: Any,
    config: SearchConfig,
    steps: int,
    *,
    show: Callable[[Sequence[Trial]], None] = lambda trials: None,
    tell: Callable[[str], None] = tell_on_stderr,
) -> Found:
    """Try every rate, on the Ray cluster that this process is connected to.

    Which trials are stopped early depends on which come first to a point (they do not wait for each other); of those
    that complete, the winner does not.

    Args:
        function: importable on the cluster's machines.
        payload: travels once, through Ray's object store.
        steps: optimiser steps of a whole trial.
        show: called with the trials so far, each time that one reports.
        tell: shows one line: that the search waits for room.

    Raises:
        TrainingError: no trial finished; the message lists each rate with what became of it.
        LaunchError: there was no room for a trial for too long, or the cluster is reached through Ray's client.
        MissingDependencyError: Ray Tune is not installed.
    """
    try:
        from ot_ray.launch.trials import run_trials
    except ImportError as error:
        raise MissingDependencyError(
            f"a search needs Ray Tune ({error}); install the platform's part: pip install 'ot_ray[platform]'"
        ) from None
    from ray.util.client import ray as client

    if client.is_connected():
        raise LaunchError(
            "a search cannot be run through Ray's client (ray://); submit it as a job, or connect by host:port"
        )
    with _interruptible() as interrupted:
        trials, outcome = run_trials(function, payload, config, steps, show, tell, interrupted)
    return _found(trials, outcome)


def _found(trials: list[Trial], outcome: tuple[float, Any] | None) -> Found:
    if outcome is None:
        raise TrainingError(_unfinished(trials))
    rate, value = outcome
    return Found(trials, next(trial for trial in trials if trial.rate == rate), value)


def _unfinished(trials: Sequence[Trial]) -> str:
    stopped = [trial for trial in trials if trial.status == "stopped"]
    failed = [trial for trial in trials if trial.status != "stopped"]
    reasons = "; ".join(f"{trial.rate:g}: {trial.reason or 'it did not finish'}" for trial in failed)
    if not stopped:
        return f"every trial of the learning-rate search failed ({reasons}); mend that, or lower search.rates"
    best = min(stopped, key=lambda trial: (trial.curve[-1]["validation_loss"], trial.rate))
    return (
        f"no trial of the learning-rate search finished: {len(failed)} failed ({reasons}), and the other "
        f"{len(stopped)} had been stopped early for being behind; the best of these is {best.rate:g}, at step "
        f"{best.step} with a validation loss of {best.curve[-1]['validation_loss']:g}; mend the failure, or try that "
        f"rate alone by search.rates=[{best.rate:g}]"
    )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, for the trials to be stopped, and arrives at the end; a second one arrives at once.

    Ray Tune would swallow it, and leaves a handler behind for another signal.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}

    def interrupt(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if event.is_set():
        raise KeyboardInterrupt
