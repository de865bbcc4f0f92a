"""The tables of a study, as Markdown and CSV.

What stands in them is results.py's and, beside it, published.py's."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from ot_ray.evaluation.five_settings import SETTINGS
from ot_ray.evaluation.study import published
from ot_ray.evaluation.study.results import Measured, Spread, Study

WIDTH = len(SETTINGS)
SHORT = {
    "full_zero_shot": "zero-shot",
    "emulator_zero_shot": "emulator zero-shot",
    "ot_emulator": "OT emulator",
    "ot_plug_in": "OT plug-in",
    "full_fine_tuned": "FT",
}
"""Column heads of the five settings."""


@dataclass(frozen=True)
class Table:
    """A table of text."""

    name: str
    """Of its CSV file, without the ending."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [_line(self.head), _line(["---"] * len(self.head)), *map(_line, self.rows)]
        return "\n".join(lines)

    def csv(self) -> bytes:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.head, *self.rows])
        return out.getvalue().encode()


def five_settings(study: Study) -> Table:
    """Table 1: the five settings of the centre."""
    rows = [[label, _text(study.centre.spread(name))] for name, label in SETTINGS.items()]
    return Table("table1", ["setting", "perplexity"], rows)


def methods(study: Study) -> Table:
    """Table 5: tuning methods."""
    head = ["method", "trainable parameters", "share of the model", "OT emulator", "OT plug-in", "gap closed"]
    rows = [
        [
            row.method + _beyond(row, study.centre, "method"),
            _count(row.trainable),
            _share(row.trainable, row.parameters),
            *_settings(row, "ot_emulator", "ot_plug_in"),
            _text(row.spread("gap_closed"), ".0%"),
        ]
        for row in study.along("methods")
    ]
    return Table("table5", head, rows)


def positions(study: Study) -> Table:
    """Figure 3 in numbers: where the adapter is and how large."""
    head = ["adapter at", "adapter layers", "split", "OT emulator", "OT plug-in", "gap closed", "emulator worse by"]
    ordered = sorted(study.along("positions"), key=lambda row: (row.position, row.bottom + row.top))
    rows = [
        [row.position, str(row.bottom + row.top), row.split, *_settings(row, "ot_emulator", "ot_plug_in"), *_two(row)]
        for row in ordered
    ]
    return Table("figure3", head, rows)


def compressions(study: Study) -> Table:
    """Figure 4 in numbers: what became of the middle."""
    head = ["compression", "distilled", "emulator's share of the middle's bytes"]
    head += [SHORT[name] for name in ("emulator_zero_shot", "ot_emulator", "ot_plug_in")]
    head += ["gap closed", "emulator worse by"]
    rows = [
        [
            row.detail,
            _yes(row.distilled),
            "" if row.ratio is None else f"{row.ratio:.3f}",
            *_settings(row, "emulator_zero_shot", "ot_emulator", "ot_plug_in"),
            *_two(row),
        ]
        for row in study.along("compressions")
    ]
    return Table("figure4", head, rows)


def layer_choices(study: Study) -> Table:
    """How the kept layers were chosen."""
    head = ["choice", "split", "distilled", "emulator zero-shot", "OT emulator", "OT plug-in"]
    head += ["gap closed", "emulator worse by"]
    rows = [
        [
            row.layers,
            row.split,
            _yes(row.distilled),
            *_settings(row, "emulator_zero_shot", "ot_emulator", "ot_plug_in"),
            *_two(row),
        ]
        for row in study.along("layers")
    ]
    return Table("layers", head, rows)


def distilled(study: Study) -> Table:
    """Table 4: distilled or not."""
    head = ["emulator", "split", "emulator zero-shot", "OT emulator", "OT plug-in", "gap closed", "emulator worse by"]
    rows = [
        [
            "distilled" if row.distilled else "not distilled",
            row.split,
            *_settings(row, "emulator_zero_shot", "ot_emulator", "ot_plug_in"),
            *_two(row),
        ]
        for row in study.along("distilled")
    ]
    return Table("table4", head, rows)


def everything(study: Study, numbers: dict[str, int]) -> Table:
    """Every row with the five settings and the two numbers of the frontier."""
    head = ["#", "configuration", *SHORT.values(), "gap closed", "emulator worse by", "promises"]
    rows = [
        [str(numbers.get(row.label, "")), row.label, *_settings(row, *SHORT), *_two(row), _verdict(row)]
        for row in study.rows
    ]
    return Table("rows", head, rows)


def published_text(figures: dict[str, dict[str, published.TextFigures]]) -> Table:
    """The paper's Tables 1 and 2, as far as they are at hand."""
    head = ["model", "setting", "WikiText perplexity", "mean of eight tasks"]
    rows = [
        [model, SETTINGS[name], _number(cell.perplexity, ".2f"), _number(cell.mean, ".1f")]
        for model, cells in figures.items()
        for name, cell in cells.items()
    ]
    return Table("published", head, rows)


def _verdict(row: Measured) -> str:
    if row.broken():
        return "broken"
    if not row.settings:
        return "failed"
    return "kept" if not row.failures else "kept where measured"


def _two(row: Measured) -> list[str]:
    return [_text(row.spread("gap_closed"), ".0%"), _text(row.spread("emulator_worse_by"), ".1%")]


def _settings(row: Measured, *names: str) -> list[str]:
    return [_text(row.spread(name)) for name in names]


def _text(spread: Spread | None, form: str = ".2f") -> str:
    return spread.text(form) if spread is not None else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _share(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.2%}" if part is not None and whole else ""


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _beyond(row: Measured, centre: Measured, name: str) -> str:
    """What else than the axis' own field tells a row from the centre."""
    others = [field for field in ("split", "detail", "distilled") if field != name]
    return "" if all(getattr(row, other) == getattr(centre, other) for other in others) else f" ({row.label})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
