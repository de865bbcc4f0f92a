"""The chart of the study: perplexity by interval, a panel a mode.

What the numbers are is outcome.py's."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from jobs.gradient_study.config import Row
from jobs.gradient_study.outcome import Outcome
from ot_ray.errors import MissingDependencyError
from ot_ray.evaluation.study import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"low_rank": "#1f77b4", "linear": "#d98e32", "mlp": "#2f8f4e"}
_REFERENCES = {"lora": ("LoRA by back-propagation", "-."), "full": ("full fine-tuning", ":")}
_GREY = "#4a4a4a"


def draw(outcome: Outcome) -> bytes:
    """Draw mean perplexity over customers into a PNG; whiskers are the seeds' smallest and largest, crosses merged.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("the chart needs matplotlib; pip install 'ot_ray[eval]'") from None
    modes = outcome.config.modes
    figure = Figure(figsize=(4.2 * len(modes) + 2.6, 4.4), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, outcome, mode)
    panels[0].set_ylabel("mean perplexity of the customers (lower is better)")
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    handles = {label: handle for pairs in found for handle, label in pairs}
    # By the order in which they were drawn, lines without whiskers would stand first.
    handles = {label: handles[label] for label in _labels(outcome) if label in handles}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8, frameon=False)
    base = "" if outcome.untouched is None else f"; {outcome.untouched:.1f} before"
    figure.suptitle(f"Gradient learning for {len(outcome.customers)} customers{base}", x=0.01, ha="left", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _labels(outcome: Outcome) -> list[str]:
    kinds = [_label(kind, merged) for kind in outcome.config.kinds for merged in (False, True)]
    return [*kinds, *(name for name, _ in _REFERENCES.values())]


def _label(kind: str, merged: bool) -> str:
    return kind.replace("_", " ") + (", merged" if merged else "")


def _panel(axes: Axes, outcome: Outcome, mode: str) -> None:
    steps = outcome.config.intervals
    for place, kind in enumerate(outcome.config.kinds):
        for merged in (False, True):
            points = []
            for position, step in enumerate(steps):
                row = Row.model_validate(
                    {"method": "gradient", "mode": mode, "kind": kind, "interval": step, "merged": merged}
                )
                spread = outcome.mean(row)
                if spread is not None:
                    points.append((position + 0.06 * (place - 1), spread))
            if points:
                _series(axes, points, _COLOURS[kind], _label(kind, merged), merged)
    for method, (name, form) in _REFERENCES.items():
        row = Row.model_validate({"method": method, "mode": "joint" if mode == "joint" else "alone"})
        spread = outcome.mean(row)
        if spread is not None:
            axes.axhline(spread.mean, color=_GREY, linestyle=form, linewidth=1.1, label=name, zorder=1)
    axes.set_title(mode, fontsize=10, loc="left")
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_xlabel("interval (batches of a fit)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _series(axes: Axes, points: list[tuple[float, Spread]], colour: str, label: str, merged: bool) -> None:
    places = [place for place, _ in points]
    means = [spread.mean for _, spread in points]
    if merged:
        axes.plot(places, means, "x", color=colour, label=label, ms=9, mew=1.2, zorder=4)
        return
    spans = [[spread.mean - spread.low for _, spread in points], [spread.high - spread.mean for _, spread in points]]
    axes.errorbar(places, means, yerr=spans, fmt="o-", color=colour, label=label, ms=5, lw=1.3, capsize=2)
