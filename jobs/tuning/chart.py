"""The curves of a learning-rate search, as a PNG."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ot_ray.errors import MissingDependencyError
from ot_ray.launch import Found, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def require_chart() -> None:
    """Raises MissingDependencyError if there is nothing to draw with."""
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("search.report needs matplotlib; pip install 'ot_ray[eval]'")


def draw_search(found: Found) -> bytes:
    """Draw validation and training loss of every trial by steps; the winner's line is the thick one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for place, name in zip(axes, ("validation_loss", "training_loss"), strict=True):
        _curves(place, found, name)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"learning-rate search: {found.winner.rate:g} wins", x=0.01, ha="left", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _curves(axes: Axes, found: Found, name: str) -> None:
    axes.set_title(f"{name.replace('_', ' ')} (nats a token)", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    for trial in found.trials:
        points = [(point["step"], point[name]) for point in trial.curve] or [(0, float("nan"))]
        width = 2.2 if trial is found.winner else 1.0
        axes.plot(*zip(*points, strict=True), label=_label(trial), linewidth=width, marker=".")


def _label(trial: Trial) -> str:
    text = f"{trial.rate:g}"
    return text if trial.status == "completed" else f"{text} ({trial.status} at step {trial.step})"
