"""The report that every evaluation of offsite tuning makes: five settings, and the two numbers that
say whether the bargain holds. How each figure is computed is perplexity.py's and accuracy.py's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ot_ray.errors import MissingDependencyError

SETTINGS = {
    "full_zero_shot": "full model, zero-shot",
    "emulator_zero_shot": "emulator, zero-shot",
    "ot_emulator": "OT emulator (tuned adapter on the emulator)",
    "ot_plug_in": "OT plug-in (tuned adapter in the full model)",
    "full_fine_tuned": "full fine-tuning (FT)",
}


@dataclass(frozen=True)
class Measure:
    """What a figure says of a model."""

    name: str
    lower_is_better: bool
    form: str
    """How a figure is written, as a format specification."""

    def better(self, one: float, other: float) -> bool:
        """Whether the first figure is the better one; neither is where one is not a number."""
        return one < other if self.lower_is_better else one > other


PERPLEXITY = Measure("perplexity", True, ".2f")
ACCURACY = Measure("accuracy", False, ".1%")


@dataclass(frozen=True)
class FiveSettings:
    """Perplexities on one test split, as in the paper's Table 1, or accuracies (0 to 1), as in its Table 3."""

    full_zero_shot: float
    emulator_zero_shot: float
    full_fine_tuned: float
    ot_emulator: float
    ot_plug_in: float
    measure: Measure = PERPLEXITY
    method: str | None = None
    """How the adapter was tuned, where that is known."""

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> FiveSettings:
        """The settings in a result or file of `jobs.evaluate`, whatever else stands there; without `measure`,
        perplexities."""
        measures = {measure.name: measure for measure in (PERPLEXITY, ACCURACY)}
        return cls(
            **{name: figures[name] for name in SETTINGS},
            measure=measures[figures.get("measure", PERPLEXITY.name)],
            method=figures.get("method"),
        )

    @property
    def gap_closed(self) -> float:
        """Share of the way from zero-shot to full fine-tuning that the plug-in model goes (1 is all of it)."""
        way = self.full_zero_shot - self.full_fine_tuned
        return (self.full_zero_shot - self.ot_plug_in) / way if way else float("nan")

    @property
    def emulator_worse_by(self) -> float:
        """How much higher the tuned emulator's perplexity is than the plug-in's (0.1 is 10 %), or how much lower its
        accuracy is, as a share of the plug-in's: what the customer gains by coming back to the owner, and what keeps
        the emulator from replacing the model."""
        if not self.ot_plug_in:
            return float("nan")
        ratio = self.ot_emulator / self.ot_plug_in
        return ratio - 1 if self.measure.lower_is_better else 1 - ratio

    def broken_promises(self) -> list[str]:
        """The inequalities of the paper (section 2.2) that do not hold; empty when all is well."""
        better = self.measure.better
        wanted = [
            (better(self.ot_plug_in, self.full_zero_shot), "the plug-in is no better than the untuned full model"),
            (better(self.ot_plug_in, self.ot_emulator), "the tuned emulator is no worse than the plug-in"),
            (better(self.full_zero_shot, self.emulator_zero_shot), "the emulator is no worse than the full model"),
        ]
        return [text for holds, text in wanted if not holds]

    def table(self) -> str:
        """A text table for a terminal."""
        width = max(map(len, SETTINGS.values()))
        lines = [f"{'setting':<{width}}  {self.measure.name:>10}", f"{'-' * width}  ----------"]
        lines += [f"{label:<{width}}  {self._written(name):>10}" for name, label in SETTINGS.items()]
        lines += [
            "",
            f"plug-in closes {self.gap_closed:.0%} of the gap from zero-shot to full fine-tuning; "
            f"the tuned emulator is {self.emulator_worse_by:.1%} worse than the plug-in",
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, float]:
        """All figures by name, the two derived ones included."""
        figures = {name: getattr(self, name) for name in SETTINGS}
        return {**figures, "gap_closed": self.gap_closed, "emulator_worse_by": self.emulator_worse_by}

    def _written(self, name: str) -> str:
        return format(getattr(self, name), self.measure.form)

    def write(self, folder: str | Path, title: str, about: Mapping[str, str] | None = None) -> dict[str, str]:
        """Write `five_settings.json` and `five_settings.png` into a folder.

        Args:
            about: what tells this report from others, such as `model` and `data`; it goes into the JSON file.

        Returns:
            The paths, by kind.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers, picture = folder / "five_settings.json", folder / "five_settings.png"
        partial = folder / "five_settings.partial"
        draw(self, title, partial)
        os.replace(partial, picture)
        described = {"title": title, **(about or {}), "method": self.method, "measure": self.measure.name}
        described |= self.as_dict()
        partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, numbers)
        return {"json": str(numbers), "chart": str(picture)}


def draw(report: FiveSettings, title: str, path: str | Path) -> None:
    """Draw the five figures as horizontal bars into a PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("the chart needs matplotlib; pip install 'ot_ray[eval]'") from None
    colours = ["#9aa5b1", "#c9b18f", "#d98e32", "#1f77b4", "#4a4a4a"]
    values = [getattr(report, name) for name in SETTINGS]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(SETTINGS.values()), values, color=colours, height=0.62)
    axes.bar_label(bars, labels=[format(value, report.measure.form) for value in values], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.12)
    direction = "lower" if report.measure.lower_is_better else "higher"
    axes.set_xlabel(f"{report.measure.name} on the customer's test split ({direction} is better)")
    figure.suptitle(
        f"{title}\nplug-in closes {report.gap_closed:.0%} of the gap to full fine-tuning; "
        f"the tuned emulator is {report.emulator_worse_by:.1%} worse than the plug-in",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    figure.savefig(path, dpi=140, format="png")
