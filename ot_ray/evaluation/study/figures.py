"""The figures of a study, as PNG: Figure 3, Figure 4, and the frontier of the two numbers that an owner decides on.

Numbers come from results.py; the tables beside them are tables.py's."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ot_ray.errors import MissingDependencyError
from ot_ray.evaluation.study.results import Measured, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ["#1f77b4", "#d98e32", "#2f8f4e", "#b8461f", "#7b5ea7", "#4a4a4a", "#c2538c", "#5b9aa0"]
_GREY = "#9aa5b1"
_NAMES = {"bottom": "at the bottom", "top": "at the top", "both": "at both ends"}
_KINDS = {"drop": "layers dropped", "prune": "pruned", "quantize": "quantized", "factor": "factored"}


def numbered(study: Study) -> dict[str, int]:
    """The number that stands for each measured configuration in the frontier, by its label."""
    return {row.label: number for number, row in enumerate(_placed(study), 1)}


def _placed(study: Study) -> list[Measured]:
    return [row for row in study.rows if row.spread("gap_closed") is not None]


def figure3(study: Study) -> bytes:
    """Perplexity by position and size of the adapter; whiskers are the seeds' smallest and largest."""
    figure = _figure(8.5, 4.6)
    axes = figure.subplots()
    rows = [row for row in study.along("positions") if row.settings]
    for colour, position in zip(_COLOURS, _NAMES, strict=False):
        found = sorted((row for row in rows if row.position == position), key=lambda row: row.bottom + row.top)
        sizes = [row.bottom + row.top for row in found]
        _series(axes, sizes, found, "ot_plug_in", colour, f"plug-in, adapter {_NAMES[position]}", "o-")
        _series(axes, sizes, found, "ot_emulator", colour, f"tuned emulator, adapter {_NAMES[position]}", "s--")
    _bounds(axes, study.centre)
    axes.set_xticks(sorted({row.bottom + row.top for row in rows}))
    axes.set_xlabel("adapter layers")
    return _finished(figure, axes, "Position and size of the adapter")


def figure4(study: Study) -> bytes:
    """Perplexity by what is left of the middle's bytes; distilled at the left, not distilled at the right."""
    figure = _figure(12, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    rows = [row for row in study.along("compressions") if row.settings and row.ratio is not None]
    kinds = list(dict.fromkeys(row.compression for row in rows))
    for axes, distilled in zip(panels, (True, False), strict=True):
        for colour, kind in zip(_COLOURS, kinds, strict=False):
            found = sorted((row for row in rows if row.compression == kind and row.distilled == distilled), key=_ratio)
            name = " and ".join(_KINDS.get(part, part) for part in kind.split("+"))
            sizes = [_ratio(row) for row in found]
            _series(axes, sizes, found, "ot_plug_in", colour, f"plug-in, {name}", "o-")
            _series(axes, sizes, found, "ot_emulator", colour, f"tuned emulator, {name}", "s--")
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="#777")
        _bounds(axes, study.centre)
        axes.set_title("distilled" if distilled else "not distilled", fontsize=10, loc="left")
        axes.set_xlabel("emulator's bytes as a share of the middle's")
        _tidy(axes)
    panels[0].set_ylabel("perplexity (lower is better)")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle("Compression of the middle", x=0.01, ha="left", fontsize=11)
    return _png(figure)


def frontier(study: Study) -> bytes:
    """Each configuration by the share of the gap that its plug-in closes and by how much its tuned emulator is worse;
    whiskers span the seeds, the shaded region is the aim."""
    rows = _placed(study)
    numbers = numbered(study)
    figure = _figure(13, max(6.0, 1.6 + 0.21 * len(rows)))
    axes = figure.subplots()
    points: list[tuple[float, float]] = []
    for row in rows:
        closed, worse = row.spread("gap_closed"), row.spread("emulator_worse_by")
        assert closed is not None and worse is not None
        x, y = 100 * closed.mean, 100 * worse.mean
        spans = [[[100 * (s.mean - s.low)], [100 * (s.high - s.mean)]] for s in (closed, worse)]
        colour = _COLOURS[0] if row.distilled else _COLOURS[3]
        face = colour if row.method == "full" else "white"
        axes.errorbar(x, y, xerr=spans[0], yerr=spans[1], color=colour, mfc=face, fmt="o", ms=6, lw=0.8, zorder=3)
        points.append((x, y))
    _aim(axes, study)
    _number(figure, axes, points, [str(numbers[row.label]) for row in rows])
    axes.set_xlabel("share of the gap from zero-shot to full fine-tuning that the plug-in closes (%)")
    axes.set_ylabel("tuned emulator's perplexity above the plug-in's (%)")
    lines = [f"{numbers[row.label]:>2}  {row.label}" for row in rows]
    aim = f"green: at least {study.aim.closed:.0%} closed, emulator {study.aim.worse:.0%} worse"
    key = ["blue: distilled, red: not distilled", "filled: full, open: another tuning method", aim, "", *lines]
    left = _left_of(figure, lines)
    figure.text(left + 0.01, 0.5, "\n".join(key), va="center", fontsize=8, family="monospace", parse_math=False)
    figure.get_layout_engine().set(rect=(0, 0, left, 1))  # type: ignore[union-attr,call-arg]
    return _finished(figure, axes, "What an owner decides on: how much is gained, and what stays with the model", None)


def _series(
    axes: Axes, places: Sequence[float], rows: Sequence[Measured], name: str, colour: str, label: str, form: str
) -> None:
    found = [spread for row in rows if (spread := row.spread(name)) is not None]
    if not found:
        return
    means = [spread.mean for spread in found]
    spans = [[spread.mean - spread.low for spread in found], [spread.high - spread.mean for spread in found]]
    face = colour if name == "ot_plug_in" else "white"
    axes.errorbar(places, means, yerr=spans, fmt=form, color=colour, mfc=face, label=label, ms=5, lw=1.3, capsize=2)


def _bounds(axes: Axes, centre: Measured) -> None:
    for name, label, form in (("full_zero_shot", "full model, zero-shot", ":"), ("full_fine_tuned", "FT", "-.")):
        spread = centre.spread(name)
        if spread is not None:
            axes.axhline(spread.mean, color=_GREY, linestyle=form, linewidth=1.2, label=label, zorder=1)


def _aim(axes: Axes, study: Study) -> None:
    aim = study.aim
    right, high = max(axes.get_xlim()[1], 100 * aim.closed + 10), max(axes.get_ylim()[1], 100 * aim.worse + 5)
    axes.set_xlim(right=right)
    axes.set_ylim(top=high)
    left, low = 100 * aim.closed, 100 * aim.worse
    axes.fill_between([left, right], low, high, color="#2f8f4e", alpha=0.12, zorder=0, linewidth=0)
    axes.axvline(left, color="#2f8f4e", linewidth=0.8, linestyle=":", zorder=1)
    axes.axhline(low, color="#2f8f4e", linewidth=0.8, linestyle=":", zorder=1)
    axes.axhline(0, color=_GREY, linewidth=0.8, zorder=1)


def _number(figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], names: Iterable[str]) -> None:
    """Put a name beside each point, on the side where it lies on the fewest others."""
    figure.canvas.draw()
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    taken = list(pixels)
    for (x, y), point, name in zip(pixels, points, names, strict=True):
        sides = [(dx, dy) for reach in (13, 24, 36) for dx, dy in _around(reach)]
        near = min(sides, key=lambda side: _crowding(x + side[0], y + side[1], taken) + 0.3 * abs(side[0] + side[1]))
        taken.append((x + near[0], y + near[1]))
        scale = 72 / figure.dpi
        axes.annotate(
            name,
            point,
            (near[0] * scale, near[1] * scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": _GREY, "lw": 0.5} if max(map(abs, near)) > 20 else None,
        )


def _around(reach: int) -> list[tuple[float, float]]:
    return [(reach, 0), (0, reach), (-reach, 0), (0, -reach), (reach, reach), (-reach, reach), (reach, -reach),
            (-reach, -reach)]  # fmt: skip


def _crowding(x: float, y: float, taken: Iterable[tuple[float, ...]]) -> float:
    return sum(max(0.0, 16 - max(abs(x - other[0]), abs(y - other[1]))) for other in taken)


def _ratio(row: Measured) -> float:
    assert row.ratio is not None
    return row.ratio


def _left_of(figure: Figure, lines: Sequence[str]) -> float:
    """Where the drawing has to end, as a share of the width, so that these lines have room at its right."""
    characters = max((len(line) for line in lines), default=0)
    inches = 0.07 * max(characters, 48) + 0.3
    return max(0.4, 1 - inches / figure.get_size_inches()[0])


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        raise MissingDependencyError("the figures need matplotlib; pip install 'ot_ray[eval]'") from None
    return Drawing(figsize=(width, height), layout="constrained", dpi=110)


def _finished(figure: Figure, axes: Axes, title: str, ylabel: str | None = "perplexity (lower is better)") -> bytes:
    if ylabel is not None:
        axes.set_ylabel(ylabel)
        _legend(figure)
    _tidy(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return _png(figure)


def _legend(figure: Figure) -> None:
    """At the right of the drawing, what several panels share once."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8, frameon=False)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    settings: dict[str, Any] = {"format": "png", "dpi": 110}
    figure.savefig(out, **settings)
    return out.getvalue()
