"""The curves of one distillation run, as a PNG: losses, rate, speed, waiting, and the emulator gap.

The page around them is run_report.py's."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ot_ray.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, float]

_INK, _MARK, _BAR = "#1f77b4", "#b8461f", {"full": "#9aa5b1", "dropped": "#c9b18f", "emulated": "#1f77b4"}
_CURVES = (
    ("lm_loss", "language loss (nats a token)"),
    ("kd_loss", "distillation loss"),
    ("lr", "learning rate"),
    ("tokens_per_s", "tokens/s"),
    ("data_wait_share", "share of the step spent waiting for data"),
)
PERPLEXITIES = {"full": "full model", "dropped": "layers dropped", "emulated": "emulator"}
_DOTS_BELOW = 40  # steps; so few would hardly show as a line


def draw_run(title: str, history: Sequence[Row], found: Mapping[str, float], bound: float | None) -> bytes:
    """Draw a run into a PNG.

    Args:
        history: figures of each step, with `step`; a row with `resumed` set is the first after an interruption.
        found: perplexities, by the names in `PERPLEXITIES`; may be empty.
        bound: the perplexity that the emulator must at least have; None draws none.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("the chart needs matplotlib; pip install 'ot_ray[eval]'") from None
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    axes = figure.subplots(2, 3)
    for place, (name, label) in zip(axes.flat, _CURVES, strict=False):
        _curve(place, history, name, label)
    _bars(axes.flat[-1], found, bound)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def resumed_at(history: Sequence[Row]) -> list[int]:
    """The first step after each interruption."""
    return [int(row["step"]) for row in history if row.get("resumed")]


def _curve(axes: Axes, history: Sequence[Row], name: str, label: str) -> None:
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    axes.set_title(label, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if not points:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color="#777")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.plot(*zip(*points, strict=True), color=_INK, linewidth=1.2, marker="." if len(points) < _DOTS_BELOW else None)
    if name == "data_wait_share":
        axes.set_ylim(0, max(0.1, *(share for _, share in points)) * 1.05)
    elif name == "tokens_per_s":
        axes.set_ylim(0, max(speed for _, speed in points) * 1.1)
    for step in resumed_at(history):
        axes.axvline(step, color=_MARK, linewidth=0.9, linestyle="--")
    axes.set_xlabel("step" + (" (dashed: resumed after an interruption)" if resumed_at(history) else ""), fontsize=8)


def _bars(axes: Axes, found: Mapping[str, float], bound: float | None) -> None:
    axes.set_title("perplexity on held-out data (lower is better)", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    shown = {name: found[name] for name in PERPLEXITIES if math.isfinite(found.get(name, math.nan))}
    if not shown:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="#777")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    bars = axes.barh(
        [PERPLEXITIES[name] for name in shown], list(shown.values()), color=[_BAR[name] for name in shown], height=0.6
    )
    axes.bar_label(bars, labels=[f"{value:.4g}" for value in shown.values()], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(shown.values()) * 1.15)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=8)
    if bound is not None and math.isfinite(bound):
        axes.axvline(bound, color=_MARK, linewidth=0.9, linestyle=":")
        axes.set_xlabel(f"dotted: the least an emulator must have, {bound:.4g}", fontsize=8)
