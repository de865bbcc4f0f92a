"""Learning rates as trials of Ray Tune, under its ASHA scheduler. Imports Ray; search.py imports it late.

Ray Tune is given nothing but figures: what the best trial made is kept by an actor beside it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ot_ray.errors import LaunchError, OTRayError, TrainingError
from ot_ray.launch.attendance import each
from ot_ray.launch.devices import gpu_visibility
from ot_ray.launch.failures import first_line
from ot_ray.launch.search import SearchConfig, Trial, TrialFunction

_STEP, _LOSS = "step", "validation_loss"
_QUIET_S, _TELL_EVERY_S = 30.0, 60.0
_SETTINGS = {
    # Its own loggers write files that nobody reads, with what TensorBoard drags in.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The new kind of output draws its tables even when it is told to be silent.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A trial finds the paths of its configuration where the driver does.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class _InterruptedError(Exception):
    """Ends Ray Tune's loop in a way that makes it stop its trials."""


class Keeper:
    """Holds what the best trial made so far, and nothing of the others."""

    def __init__(self) -> None:
        self._best: tuple[float, float] | None = None
        self._outcome: Any = None

    def wants(self, loss: float, rate: float) -> bool:
        """Whether a trial's outcome would be the best; of equal losses the smaller rate's is."""
        return self._best is None or (loss, rate) < self._best

    def keep(self, loss: float, rate: float, outcome: Any) -> None:
        """Take an outcome, if it is still the best."""
        if self.wants(loss, rate):
            self._best, self._outcome = (loss, rate), outcome

    def best(self) -> tuple[float, Any] | None:
        """Rate and outcome of the best trial; None if none has finished."""
        return (self._best[1], self._outcome) if self._best is not None else None


@dataclass(frozen=True)
class _Work:
    """What every trial is handed; it travels through the object store."""

    function: TrialFunction
    payload: Any
    steps: int
    keeper: Any
    environment: Mapping[str, str]


def run_trials(
    function: TrialFunction,
    payload: Any,
    config: SearchConfig,
    steps: int,
    show: Callable[[Sequence[Trial]], None],
    tell: Callable[[str], None],
    interrupted: threading.Event,
) -> tuple[list[Trial], tuple[float, Any] | None]:
    """As `search_rates`; an interrupted search returns after its trials were stopped.

    Returns:
        A trial for each rate, and the winner's rate with its outcome.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    keeper: Any = ray.remote(num_cpus=0)(Keeper).options(scheduling_strategy=here).remote()
    watch = _Watch(config, steps, show, tell, interrupted)
    try:
        with tempfile.TemporaryDirectory(prefix="ot-ray-search-") as place, _quiet():
            work = _Work(function, payload, steps, keeper, gpu_visibility(config.resources))
            results = _fit(_tuner(work, config, steps, watch, place))
            # They come in the order of the grid; a trial that reported nothing does not know its own rate.
            for rate, result in zip(config.rates, results, strict=True):
                if result.error is not None:
                    watch.failed(result.error, rate)
        best: Any = ray.get(keeper.best.remote())
    except _InterruptedError:
        return watch.trials, None
    finally:
        ray.kill(keeper)
    for trial in watch.trials:
        trial.status = _status(trial, steps, best[0] if best is not None else None)
    return watch.trials, best


def _tuner(work: _Work, config: SearchConfig, steps: int, watch: tune.Callback, place: str) -> tune.Tuner:
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, work=work), config.resources),
        param_space={"rate": tune.grid_search(list(config.rates))},
        tune_config=tune.TuneConfig(
            metric=_LOSS,
            mode="min",
            scheduler=ASHAScheduler(
                time_attr=_STEP,
                max_t=steps,
                grace_period=min(config.grace_steps or max(1, steps // 4), steps),
                reduction_factor=config.reduction_factor,
            ),
            max_concurrent_trials=config.max_concurrent,
        ),
        run_config=tune.RunConfig(name="search", storage_path=place, verbose=0, callbacks=[watch]),
    )


def _fit(tuner: tune.Tuner) -> Any:
    try:
        return tuner.fit()
    except tune.TuneError as error:
        # Ray Tune wraps what a callback raises.
        if isinstance(error.__cause__, LaunchError | _InterruptedError):
            raise error.__cause__ from None
        raise


def _trial(space: dict[str, float], work: _Work) -> None:
    """Runs on a machine of the cluster, with what Ray Tune chose."""
    # A trial has a process of its own, and nothing has looked for GPUs there yet.
    os.environ.update(work.environment)
    rate, losses = space["rate"], []
    last: dict[str, float] = {}

    def report(figures: Mapping[str, float]) -> None:
        losses.append(figures["loss"])
        if _LOSS not in figures:
            return
        last.update({_STEP: figures[_STEP], _LOSS: figures[_LOSS], "training_loss": math.fsum(losses) / len(losses)})
        losses.clear()
        if not math.isfinite(last[_LOSS]):
            raise TrainingError(f"the validation loss became {last[_LOSS]} at step {last[_STEP]:.0f}")
        # A trial may be ended by its report: the one of its last step waits until what it made is safe.
        if last[_STEP] < work.steps:
            tune.report(dict(last))

    outcome = work.function(work.payload, rate, report)
    if last.get(_STEP) != work.steps:
        raise TrainingError(f"the validation loss of step {work.steps}, the last, was not measured")
    if ray.get(work.keeper.wants.remote(last[_LOSS], rate)):
        ray.get(work.keeper.keep.remote(last[_LOSS], rate, outcome))
    tune.report(dict(last))


def _status(trial: Trial, steps: int, winner: float | None) -> Any:
    if trial.rate == winner or (trial.reason is None and trial.step == steps):
        return "completed"
    return "failed" if trial.reason is not None or not trial.curve else "stopped"


def _reason(error: BaseException) -> str:
    """Why a trial failed, without the stack."""
    # What was raised on the other machine; without it the trial's process is gone, or never came up.
    cause = getattr(error, "cause", None)
    if isinstance(cause, OTRayError):
        return str(cause)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
    return first_line(error).partition(" Some common causes")[0]


class _Watch(tune.Callback):
    """Sees every report in the driver, and ends a search that waits in vain or is interrupted."""

    def __init__(
        self,
        config: SearchConfig,
        steps: int,
        show: Callable[[Sequence[Trial]], None],
        tell: Callable[[str], None],
        interrupted: threading.Event,
    ) -> None:
        self.trials = [Trial(rate) for rate in config.rates]
        self._config, self._steps, self._show, self._tell = config, steps, show, tell
        self._interrupted = interrupted
        self._since = time.monotonic()
        self._tell_at, self._waiting = self._since + _QUIET_S, True

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune writes down what it was given, to resume by; a search is not resumed.
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._interrupted.is_set():
            raise _InterruptedError
        if self._waiting:
            self._wait()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._waiting = False

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        seen = self._of(trial.config["rate"])
        if result[_STEP] > seen.step:
            seen.curve.append(
                {_STEP: int(result[_STEP]), **{name: float(result[name]) for name in (_LOSS, "training_loss")}}
            )
        self._show(self.trials)

    def failed(self, error: BaseException, rate: float) -> None:
        """Note why a trial failed."""
        self._of(rate).reason = _reason(error)

    def _of(self, rate: float) -> Trial:
        return next(trial for trial in self.trials if trial.rate == rate)

    def _wait(self) -> None:
        waited = time.monotonic() - self._since
        needs = f"{each(self._config.resources)} (search.cpus, search.gpus)"
        if waited > self._config.start_timeout_s:
            raise LaunchError(
                f"no trial of the search started for {self._config.start_timeout_s:.0f} s; each needs {needs}: add "
                "machines, ask for less, or wait longer with search.start_timeout_s"
            )
        if time.monotonic() > self._tell_at:
            self._tell_at = time.monotonic() + _TELL_EVERY_S
            left = self._config.start_timeout_s - waited
            self._tell(
                f"waiting for a first trial to start; it needs {needs} ({left:.0f} s left, search.start_timeout_s)"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Tune's settings for the time, and none of its notices: what becomes of each trial is in the result."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_SETTINGS)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
