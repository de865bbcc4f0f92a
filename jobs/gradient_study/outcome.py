"""What a study measured, and the figures that a reader asks of it.

How they are shown is tables.py's and chart.py's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.gradient_study.choosing import Found
from jobs.gradient_study.config import GradientStudyConfig, Row
from jobs.gradient_study.work import Result
from ot_ray.evaluation.study import Spread


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured."""

    config: GradientStudyConfig
    model: str
    """The base model's name."""
    tokens: Mapping[str, Mapping[str, int]]
    """By customer, of each part of its text."""
    zero: Result | None
    """Of the base as it is."""
    found: Mapping[Row, Found]

    @property
    def customers(self) -> list[str]:
        """By name."""
        return [customer.name for customer in self.config.customers]

    @property
    def untouched(self) -> float | None:
        """Mean over customers of the base's perplexity on test text."""
        return None if self.zero is None else statistics.fmean(self.zero["test"].values())

    def mean(self, row: Row) -> Spread | None:
        """Mean over customers of the perplexity on test text, over the seeds; None where nothing was measured."""
        results = self._results(row)
        return Spread(tuple(statistics.fmean(one["test"].values()) for one in results)) if results else None

    def of(self, row: Row, customer: str) -> Spread | None:
        """Perplexity on one customer's test text, over the seeds."""
        results = self._results(row)
        return Spread(tuple(one["test"][customer] for one in results)) if results else None

    def closed(self, row: Row) -> Spread | None:
        """Share of what LoRA by back-propagation gains in the same mode that the row gains, seed by seed; mode
        `collaboration` is held against LoRA alone."""
        reference = Row(method="lora", mode="joint" if row.mode == "joint" else "alone")
        if self.untouched is None or row not in self.found or reference not in self.found:
            return None
        gained, wanted = self._gains(row), self._gains(reference)
        shares = [gained[seed] / wanted[seed] for seed in gained if wanted.get(seed, 0.0) > 0]
        return Spread(tuple(shares)) if shares else None

    def merging_changes(self) -> float | None:
        """The largest relative difference of a customer's perplexity between a row merged and unmerged."""
        pairs = ((row, row.unmerged) for row in self.found if row.merged)
        return max((gap for one, other in pairs for gap in self._gaps(one, other)), default=None)

    def fitting_changes(self) -> float | None:
        """The largest relative difference of a customer's perplexity between gradient learning of low rank with
        interval 1 and LoRA by back-propagation, where both have the same rate."""
        gaps = []
        for mode in ("joint", "alone"):
            one, other = Row(method="gradient", mode=mode), Row(method="lora", mode=mode)
            if one in self.found and other in self.found and self.found[one].lr == self.found[other].lr:
                gaps += self._gaps(one, other)
        return max(gaps, default=None)

    def at_an_end(self) -> list[Row]:
        """Rows whose best rate is the least or the highest of those to choose from."""
        return [
            row
            for row, one in self.found.items()
            if not row.merged and one.lr in (self.config.rates.of(row)[0], self.config.rates.of(row)[-1])
        ]

    def failures(self) -> Iterator[tuple[Row, int, str]]:
        """Rows and seeds without a result, and why."""
        for row, one in self.found.items():
            for seed, why in sorted(one.failures.items()):
                yield row, seed, why

    def plain(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "model": self.model,
            "config": self.config.model_dump(mode="json"),
            "tokens": {name: dict(parts) for name, parts in self.tokens.items()},
            "zero_shot": self.zero,
            "rows": [
                {
                    **row.model_dump(mode="json"),
                    "lr": one.lr,
                    "validation_by_lr": {
                        f"{lr:g}": value if math.isfinite(value) else None for lr, value in sorted(one.tried.items())
                    },
                    "seeds": {str(seed): result for seed, result in sorted(one.results.items())},
                    "failures": {str(seed): why for seed, why in sorted(one.failures.items())},
                }
                for row, one in self.found.items()
            ],
        }

    def _results(self, row: Row) -> list[Result]:
        return list(self.found[row].results.values()) if row in self.found else []

    def _gains(self, row: Row) -> dict[int, float]:
        assert self.untouched is not None
        return {
            seed: self.untouched - statistics.fmean(result["test"].values())
            for seed, result in self.found[row].results.items()
        }

    def _gaps(self, row: Row, other: Row) -> Iterator[float]:
        theirs = self.found[other].results
        for seed, result in self.found[row].results.items():
            for name, value in result["test"].items() if seed in theirs else ():
                yield abs(value / theirs[seed]["test"][name] - 1)
