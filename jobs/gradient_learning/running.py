"""One run of gradient learning: in this process, or by a group of workers that share a base model of many GPUs.

What it works on is work.py's, what becomes of the result exporting.py's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jobs.command import quiet_libraries
from jobs.gradient_learning.config import ColaConfig
from jobs.gradient_learning.work import Work, identity, load_base, make_mode, open_work
from ot_ray.cola import BasePass, Fits, Mode, make_fitter
from ot_ray.errors import TrainingError
from ot_ray.launch import AuxiliaryPool, RunMetrics, ray_cluster, run_workers
from ot_ray.progress import Progress
from ot_ray.store import open_store
from ot_ray.training import Fitting, FittingHere, GradientCheckpoints, TrainingResult, learn
from ot_ray.training.loop import Evaluate, Report

_CPU = torch.device("cpu")
Learnt = tuple[TrainingResult, Mapping[str, Any]]
"""Figures, and `Fits.state_dict` by owner."""


def learn_here(config: ColaConfig, work: Work) -> Learnt:
    """Run with the base model in this process; fits are here too, or on workers of a cluster."""
    base = load_base(config, work)
    mode = make_mode(config, work, base.model.device)
    device = base.model.device if config.fit_on == "base" else _CPU
    with _cluster(config), _closed(_fitting(config, work, device)) as fitting, _shown(config) as report:
        result = learn(
            base,
            mode,
            work.batches,
            fitting,
            config.run,
            checkpoints=_checkpoints(config, work),
            evaluate=_evaluate(config, work, base, mode),
            report=report,
        )
        return result, fitting.states()


def learn_by_group(config: ColaConfig, work: Work) -> Learnt:
    """Run with the base model shared by a group of workers; what they learnt comes back as their last checkpoint."""
    assert config.base_workers is not None
    # What was left out must stay so: it says whether a schedule's length was given.
    payload = config.model_dump(mode="json", exclude_unset=True, exclude={"bundle"})
    with ray_cluster(config.address, dashboard=False):
        run_workers(learn_on_rank, payload, config.base_workers, "cola")
    checkpoints = _checkpoints(config, work)
    state = checkpoints.resume() if checkpoints is not None else None
    if state is None or state.step != config.run.steps:
        raise TrainingError(
            f"the workers' last checkpoint is not under {config.checkpoints}; name a place that all machines reach"
        )
    return TrainingResult(state.history, state.evaluations), state.fits


def learn_on_rank(payload: dict[str, Any]) -> dict[str, Any]:
    """What each worker of such a group does.

    Args:
        payload: values of a `ColaConfig`.
    """
    from ot_ray.training.gradient_workers import learn_together, open_sharded_base

    quiet_libraries()
    config = ColaConfig.model_validate(payload)
    with tempfile.TemporaryDirectory() as temporary:
        work = open_work(config, Path(temporary))
    base = open_sharded_base(work.source, config.model.dtype, list(work.sites))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else _CPU
    mode = make_mode(config, work, device)
    shown = _shown(config) if base.messages.rank == 0 else _unseen()
    with shown as report:
        learn_together(
            base,
            mode,
            work.batches,
            lambda: _fitting(config, work),
            config.run,
            checkpoints=lambda: _required(_checkpoints(config, work)),
            evaluate=_evaluate(config, work, base, mode),
            report=report,
        )
    return {}


def _evaluate(config: ColaConfig, work: Work, base: BasePass, mode: Mode) -> Evaluate | None:
    return (lambda: work.evaluate(base, mode, config.run.merged)) if work.evaluated else None


def _fitting(config: ColaConfig, work: Work, device: torch.device = _CPU) -> Fitting:
    """Where the auxiliaries are fitted.

    Args:
        device: in this process.
    """
    plans = {name: owner.fitting for name, owner in work.owners.items()}
    if config.workers is not None:
        return AuxiliaryPool(work.start, plans, config.workers)
    return FittingHere(Fits({name: make_fitter(work.start[name].copy(device), plan) for name, plan in plans.items()}))


@contextmanager
def _cluster(config: ColaConfig) -> Iterator[None]:
    """The cluster of the workers that fit, where there are some."""
    if config.workers is None:
        yield
        return
    with ray_cluster(config.address, dashboard=False):
        yield


@contextmanager
def _closed(fitting: Fitting) -> Iterator[Fitting]:
    try:
        yield fitting
    finally:
        fitting.close()


@contextmanager
def _shown(config: ColaConfig) -> Iterator[Report]:
    """What shows each step's figures: a bar, and metrics where Ray is."""
    on_ray = config.workers is not None or config.base_workers is not None
    metrics = RunMetrics(config.model.name) if on_ray else None
    with Progress("cola", config.run.steps) as bar:

        def report(figures: Mapping[str, float]) -> None:
            bar.at(int(figures["step"]), **{name: figures[name] for name in _FIGURES})
            if metrics is not None:
                metrics.observe(figures)

        yield report


_FIGURES = ("loss", "tokens_per_s", "fit_wait_share")


@contextmanager
def _unseen() -> Iterator[Callable[[Mapping[str, float]], None]]:
    yield lambda figures: None


def _checkpoints(config: ColaConfig, work: Work) -> GradientCheckpoints | None:
    if config.checkpoints is None:
        return None
    return GradientCheckpoints(
        open_store(config.checkpoints), "cola", identity(config, work), keep=config.keep_checkpoints
    )


def _required(checkpoints: GradientCheckpoints | None) -> GradientCheckpoints:
    assert checkpoints is not None, "the settings see to it"
    return checkpoints
