"""What each worker of a distillation runs, and what rank 0 shows of it: a bar or lines of JSON, and metrics."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from jobs.command import quiet_libraries
from ot_ray.launch import RunMetrics
from ot_ray.progress import Progress
from ot_ray.training import DistillConfig, distill

_LOSSES = {"lm_loss": "lm", "kd_loss": "kd"}
_SPEEDS = {"tokens_per_s": "tokens/s", "images_per_s": "images/s"}


def distill_on_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Distil on this rank.

    Args:
        payload: `distill`, the values of a `DistillConfig`; `log`, "bar" or "json".
    """
    quiet_libraries()
    config = DistillConfig.model_validate(payload["distill"])
    if os.environ.get("RANK", "0") != "0":
        return distill(config)
    with Shown(config.model.name, config.training.steps, payload["log"]) as shown:
        return distill(config, shown.report)


class Shown:
    """Shows the figures of each step: for a person, for a program, and as Ray metrics.

    Where a driver shows what its workers print, Ray puts the worker's name before each line; a program that
    wants a log without it reads the run's history in the store.

    Args:
        log: `bar` draws progress, `json` prints one line a step; both on standard error.
    """

    def __init__(self, model: str, steps: int, log: Literal["bar", "json"]) -> None:
        self._steps = steps
        self._metrics = RunMetrics(model)
        self._bar = Progress("distil", steps) if log == "bar" else None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Shown:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def report(self, figures: Mapping[str, float]) -> None:
        """Show one step's figures; adds `seconds_left`."""
        figures = {**figures, "seconds_left": self._seconds_left(int(figures["step"]), figures["seconds"])}
        self._metrics.observe(figures)
        if self._bar is None:
            print(json.dumps(figures), file=sys.stderr, flush=True)
        else:
            self._bar.at(int(figures["step"]), **short(figures))

    def _seconds_left(self, step: int, seconds: float) -> float:
        # The mean over this process, which counts checkpoints too; the first step alone says what it took.
        moment = time.monotonic()
        if self._first is None:
            self._first = step, moment
        done, since = step - self._first[0], moment - self._first[1]
        return (self._steps - step) * (since / done if done else seconds)


def short(figures: Mapping[str, float]) -> dict[str, float | str]:
    """The figures that stand behind the bar; the time left is part of the bar itself."""
    shown: dict[str, float | str] = {label: figures[name] for name, label in _LOSSES.items() if name in figures}
    shown |= {label: f"{figures[name]:,.0f}" for name, label in _SPEEDS.items() if name in figures}
    shown["wait"] = f"{figures['data_wait_share']:.0%}"
    if "mfu" in figures:
        shown["mfu"] = f"{figures['mfu']:.0%}"
    return shown
