"""The page that a distillation run leaves: verdict, emulator gap, cost, curves and configuration.

How a page looks is html_page.py's, the curves are run_chart.py's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ot_ray.evaluation.gate import Verdict
from ot_ray.evaluation.html_page import flat, page, picture, table
from ot_ray.evaluation.run_chart import PERPLEXITIES, Row, draw_run, resumed_at


@dataclass(frozen=True)
class RunReport:
    """What is known of a run when it ends."""

    model: str
    """The owner's name of the model."""
    version: str
    """Of the bundle."""
    run: str
    """Name of the run."""
    history: Sequence[Row]
    """Figures of each step."""
    perplexity: Mapping[str, float]
    """`full`, `dropped` and `emulated`; empty where none were measured."""
    verdict: Verdict
    """The gate's."""
    bound: float | None
    """The perplexity that the emulator must at least have."""
    workers: int
    """Workers, where the history does not say how many there were."""
    price_per_worker_hour: float | None
    """In the owner's currency; None where unknown."""
    config: Mapping[str, Any]
    """The configuration, as plain values."""

    @property
    def title(self) -> str:
        """One line that names the run."""
        return f"{self.model}, version {self.version}: " + ("passed the gate" if self.verdict.passed else "rejected")

    @property
    def worker_hours(self) -> float:
        """Hours of stepping, times the workers that stepped; start-up and evaluation are not in it."""
        return sum(row.get("seconds", 0.0) * row.get("workers", self.workers) for row in self.history) / 3600

    @property
    def cost(self) -> float | None:
        """Of those hours; None where the price is unknown."""
        return None if self.price_per_worker_hour is None else self.worker_hours * self.price_per_worker_hour

    def chart(self) -> bytes:
        """The curves, as a PNG. Raises MissingDependencyError."""
        return draw_run(self.title, self.history, self.perplexity, self.bound)

    def page(self, chart: bytes) -> str:
        """The page, with the chart in it."""
        return page(
            self.title,
            [
                _verdict(self.verdict),
                "<h2>Emulator gap</h2>",
                _gap(self.perplexity),
                "<h2>The run</h2>",
                table(self._figures()),
                "<h2>Curves</h2>",
                picture(chart, "losses, learning rate, speed and waiting by step"),
                "<h2>Configuration</h2>",
                table(flat(self.config), "value"),
            ],
        )

    def _figures(self) -> list[tuple[str, str]]:
        last = self.history[-1] if self.history else {}
        figures = [("run", self.run), ("steps", f"{int(last.get('step', 0)):,}")]
        figures += [
            (label, f"{last[name]:.4g}")
            for name, label in (("loss", "last loss"), ("lm_loss", "last language loss"), ("kd_loss", "last KD loss"))
            if name in last
        ]
        for name, label, form in _RATES:
            values = [row[name] for row in self.history if math.isfinite(row.get(name, math.nan))]
            figures += [(f"{label}, median", format(statistics.median(values), form))] if values else []
        figures.append(("waiting for data, share of all steps", f"{self._waiting():.2%}"))
        figures.append(("interruptions", _interruptions(self.history)))
        figures.append(("worker hours", f"{self.worker_hours:,.3g}"))
        if self.cost is not None:
            figures.append(("cost", f"{self.cost:,.2f} ({self.price_per_worker_hour:g} a worker hour)"))
        return figures

    def _waiting(self) -> float:
        seconds = sum(row.get("seconds", 0.0) for row in self.history)
        return sum(row.get("data_wait", 0.0) for row in self.history) / seconds if seconds else 0.0


_RATES = (
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("images_per_s", "images/s", ",.1f"),
    ("mfu", "model FLOP utilisation", ".1%"),
)


def _verdict(verdict: Verdict) -> str:
    lines = "".join(f"<li>{escape(text)}</li>" for text in (*verdict.reasons, *verdict.notes))
    kind, text = ("passed", "Passed the gate.") if verdict.passed else ("failed", "Rejected: kept, not published.")
    return f'<div class="verdict {kind}"><strong>{text}</strong><ul>{lines}</ul></div>'


def _gap(found: Mapping[str, float]) -> str:
    if not found:
        return "<p>Not measured: no held-out data was given.</p>"
    rows = [(PERPLEXITIES.get(name, name), f"{value:.4g}") for name, value in found.items()]
    return "<p>Perplexity on held-out data:</p>" + table(rows)


def _interruptions(history: Sequence[Row]) -> str:
    steps = resumed_at(history)
    return f"{len(steps)}, resumed at step {', '.join(map(str, steps))}" if steps else "none"
