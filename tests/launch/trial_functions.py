"""What the tests of the search run as trials."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ot_ray.errors import TrainingError

Report = Callable[[dict[str, float]], None]


def told_losses(payload: dict[str, Any], rate: float, report: Report) -> dict[str, Any]:
    """Report the validation losses that the payload holds for this rate, every second step."""
    curve = payload["curves"][rate]
    for step in range(1, 2 * len(curve) + 1):
        figures = {"step": float(step), "loss": float(step)}
        if step % 2 == 0:
            figures["validation_loss"] = curve[step // 2 - 1]
        report(figures)
    return {"rate": rate, "weights": payload["weights"] * rate}


def failing(payload: dict[Any, str], rate: float, report: Report) -> str:
    """Fail at the second of four steps in the way that the payload names for this rate."""
    report({"step": 1.0, "loss": 2.0, "validation_loss": 2.0})
    how = payload.get(rate)
    if how == "ours":
        raise TrainingError("the loss became nan at step 2; lower training.lr")
    if how == "foreign":
        raise ValueError("odd\nin two lines")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    for step in (2.0, 3.0, 4.0):
        if how == "unmeasured" and step == 4:
            continue
        report({"step": step, "loss": 1.0, "validation_loss": math.nan if how == "nan" else 1.0})
    return "made"


def falling(payload: dict[float, list[float]], rate: float, report: Report) -> None:
    """Report this rate's validation losses, one a step, and die before the last step."""
    for step, loss in enumerate(payload[rate], 1):
        report({"step": float(step), "loss": 1.0, "validation_loss": loss})
    raise TrainingError("the disk is full; make room")


def seen_gpus(payload: None, rate: float, report: Report) -> str | None:
    """One step; what hides GPUs from the trial."""
    report({"step": 1.0, "loss": 1.0, "validation_loss": 1.0})
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def endless(payload: dict[str, str], rate: float, report: Report) -> None:
    """Leave a mark, and go on for as long as anybody may wait."""
    Path(payload["marks"], str(os.getpid())).touch()
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        time.sleep(0.2)
