"""The report of a run of gradient learning: a page with figures and curves, and every pass's figures as JSON lines.

The results themselves are exporting.py's."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.gradient_learning.config import ColaConfig
from ot_ray.errors import MissingDependencyError
from ot_ray.evaluation.html_page import flat, page, picture, table
from ot_ray.training import TrainingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Mapping[str, float]

PAGE, HISTORY, CHART = "report.html", "history.jsonl", "chart.png"
_NAMED = 10
"""Customers whose curves have names; more would hide the curves."""
_INK = "#1f77b4"


def require_chart() -> None:
    """Raises MissingDependencyError if there is nothing to draw with."""
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("report needs matplotlib; pip install 'ot_ray[eval]'")


def write_report(folder: Path, config: ColaConfig, result: TrainingResult, told: Mapping[str, Any]) -> None:
    """Write the page, its chart and the figures into a folder.

    Args:
        told: what the verb says of the run as a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Gradient learning on {told['model']}, mode {told['mode']}"
    chart = draw(title, result)
    (folder / CHART).write_bytes(chart)
    (folder / HISTORY).write_text("".join(json.dumps(figures) + "\n" for figures in result.history))
    parts = [
        "<h2>Customers</h2>",
        table(
            [_customer(name, row) for name, row in told["customers"].items()],
            head=("", "training tokens", "last loss", "perplexity before", "perplexity"),
        ),
        "<h2>The run</h2>",
        table(_figures(result.history, told)),
        "<h2>Curves</h2>",
        picture(chart, "training and validation loss by customer, speed, and waiting for fits, by step"),
        "<h2>Configuration</h2>",
        table(flat(config.model_dump(mode="json")), "value"),
    ]
    (folder / PAGE).write_text(page(title, parts), encoding="utf-8")


def draw(title: str, result: TrainingResult) -> bytes:
    """Draw a run's curves into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots(2, 2)
    _by_customer(axes[0, 0], result.history, "loss", "training loss (nats a token)")
    _by_customer(axes[0, 1], result.evaluations, "validation_loss", "validation loss (nats a token)")
    _curve(axes[1, 0], result.history, "tokens_per_s", "tokens/s")
    _curve(axes[1, 1], result.history, "fit_wait_share", "share of the step spent waiting for fits")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    return drawn.getvalue()


def _by_customer(axes: Axes, rows: Sequence[Figures], name: str, label: str) -> None:
    names = sorted({key for row in rows for key in row if key.startswith(f"{name}/")})
    for key in names:
        _line(axes, rows, key, label=key.partition("/")[2])
    _titled(axes, label, any_there=bool(names))
    if 1 < len(names) <= _NAMED:
        axes.legend(fontsize=8, frameon=False)


def _curve(axes: Axes, rows: Sequence[Figures], name: str, label: str) -> None:
    _line(axes, rows, name, color=_INK)
    _titled(axes, label, any_there=bool(rows))
    axes.set_ylim(bottom=0)


def _line(axes: Axes, rows: Sequence[Figures], name: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 40 else None, **style)


def _titled(axes: Axes, label: str, any_there: bool) -> None:
    axes.set_title(label, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    if not any_there:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="#777")


def _customer(name: str, row: Mapping[str, Any]) -> list[str]:
    cells = [row[key] for key in ("loss", "perplexity_before", "perplexity")]
    return [name, f"{row['tokens']:,}", *("" if cell is None else f"{cell:.4g}" for cell in cells)]


def _figures(history: Sequence[Figures], told: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("passes of the base model", f"{told['steps']:,}"),
        ("fits, of all auxiliaries", f"{int(history[-1]['fits']):,}"),
        ("batches refused, not finite", f"{told['refused']:,}"),
        ("seconds a step, median", f"{statistics.median(row['seconds'] for row in history):.3g}"),
        ("tokens/s, median", f"{statistics.median(row['tokens_per_s'] for row in history):,.0f}"),
        ("waiting for fits, share of all steps", f"{told['fit_wait_share']:.2%}"),
    ]
