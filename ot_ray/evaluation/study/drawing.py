"""A table of a study as a picture, for slides and for whoever reads no Markdown.

What stands in it is tables.py's and elsewhere.py's; figures are figures.py's."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from ot_ray.errors import MissingDependencyError
from ot_ray.evaluation.study.tables import Table

_WIDEST, _WIDEST_HEAD = 30, 16
"""Characters of a line in a cell, and in the head; longer text is broken between words."""
_INCHES, _LINE, _PADDING = 0.078, 0.165, 0.16
"""Width of a character of 8 points, height of a line of it, and what is left free in a cell, all in inches."""
_RULE, _STRIPE = "#4a4a4a", "#f3f5f7"


def drawn(table: Table, title: str) -> bytes:
    """The table as a PNG file: its title, its head between rules, and every cell, long ones over several lines.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("the tables as pictures need matplotlib; pip install 'ot_ray[eval]'") from None
    head = [_broken(cell, _WIDEST_HEAD) for cell in table.head]
    rows = [head, *([_broken(cell, _WIDEST) for cell in row] for row in table.rows)]
    widths = [_INCHES * max(_width(row[place]) for row in rows) + _PADDING for place in range(len(table.head))]
    heights = [_LINE * max(cell.count("\n") + 1 for cell in row) + _PADDING / 2 for row in rows]
    margin, top = 0.15, 0.4
    size = max(sum(widths), 0.095 * len(title)) + 2 * margin, sum(heights) + top + margin
    figure = Figure(figsize=size, dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    axes.text(margin, top / 2, title, va="center", fontsize=10, weight="bold", parse_math=False)
    right, y = margin + sum(widths), top
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if number and number % 2 == 0:
            axes.fill_between([margin, right], y, y + height, color=_STRIPE, linewidth=0)
        for x, width, cell, numeric in zip(_starts(margin, widths), widths, row, _numeric(table), strict=True):
            place, side = (x + width - _PADDING / 2, "right") if numeric else (x + _PADDING / 2, "left")
            weight = "normal" if number else "bold"
            axes.text(place, y + height / 2, cell, ha=side, va="center", fontsize=8, weight=weight, parse_math=False)
        if number < 2:
            axes.plot([margin, right], [y, y], color=_RULE, linewidth=0.9)
        y += height
    axes.plot([margin, right], [y, y], color=_RULE, linewidth=0.9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _broken(cell: str, widest: int) -> str:
    return "\n".join(textwrap.wrap(cell, widest))


def _width(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def _starts(first: float, widths: Sequence[float]) -> list[float]:
    return [first + sum(widths[:place]) for place in range(len(widths))]


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, and are set flush right."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.head)
    return [all(not cell or cell[0].isdigit() or cell[0] == "-" or cell == "failed" for cell in c) for c in columns]
