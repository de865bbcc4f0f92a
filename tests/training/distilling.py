"""What the ranks of the distillation tests run; each leaves what `distill` returned in `<folder>/<rank>.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ot_ray.training import DistillConfig, distill


class StoppedError(Exception):
    """Stands for whatever ends a worker between two steps."""


def distil(values: dict[str, Any], folder: Path) -> None:
    summary = distill(DistillConfig.model_validate(values))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(summary), encoding="utf-8")


def distil_until(values: dict[str, Any], step: int) -> None:
    """Distil, and stop after a step as if the machine went away: no checkpoint is taken for it."""

    def report(figures: Mapping[str, float]) -> None:
        if figures["step"] == step:
            raise StoppedError

    try:
        distill(DistillConfig.model_validate(values), report)
    except StoppedError:
        return
    raise RuntimeError("the run was not stopped")
