"""Measured rows over their seeds: means, spreads, and whether the promises of offsite tuning hold.

How they are shown is tables.py's and figures.py's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ot_ray.evaluation.five_settings import FiveSettings

Position = Literal["bottom", "top", "both"]


@dataclass(frozen=True)
class Aim:
    """What an owner wants of a configuration."""

    closed: float = 0.75
    """Share of the gap from zero-shot to full fine-tuning that the plug-in at least closes."""
    worse: float = 0.05
    """How much higher the tuned emulator's perplexity at least is than the plug-in's."""

    def score(self, closed: float, worse: float) -> float:
        """The smaller of the two numbers as a share of what is wanted; both are reached from 1 on."""
        return min(closed / self.closed, worse / self.worse if self.worse else float("inf"))


@dataclass(frozen=True)
class Spread:
    """One number over several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def text(self, form: str = ".2f") -> str:
        """The mean, and with several seeds the smallest and the largest value."""
        mean, low, high = (format(value, form) for value in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Measured:
    """One configuration with its five settings for each seed."""

    label: str
    bottom: int
    keep: int
    top: int
    method: str
    compression: str
    """`drop`, `prune`, `quantize`, `factor` or several of them joined by +."""
    detail: str
    """What the compression is, in words."""
    layers: str
    """How the kept layers were chosen."""
    distilled: bool
    settings: Mapping[int, FiveSettings] = field(default_factory=dict)
    """By seed."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """By seed, why there is nothing."""
    ratio: float | None = None
    """Bytes of the emulator as a share of the middle's."""
    trainable: int | None = None
    """Parameters that tuning trains."""
    parameters: int | None = None
    """Parameters of the full model."""

    @property
    def split(self) -> str:
        return f"{self.bottom}-{self.keep}-{self.top}"

    @property
    def position(self) -> Position:
        """Where the adapter is."""
        return "bottom" if not self.top else "top" if not self.bottom else "both"

    def spread(self, name: str) -> Spread | None:
        """A setting, `gap_closed` or `emulator_worse_by` over the seeds that were measured; None without any.

        Where full fine-tuning gains nothing there is no gap to close, and the share of it is None too.
        """
        found = self.settings.values()
        if name == "gap_closed" and any(one.full_fine_tuned >= one.full_zero_shot for one in found):
            return None
        return Spread(tuple(float(getattr(one, name)) for one in found)) if found else None

    def broken(self) -> list[str]:
        """Where the plug-in is not better than zero-shot and than the tuned emulator, seed by seed."""
        wrong = []
        for seed, found in sorted(self.settings.items()):
            for other, name in ((found.full_zero_shot, "zero-shot"), (found.ot_emulator, "the tuned emulator")):
                if not found.ot_plug_in < other:
                    wrong.append(f"seed {seed}: plug-in {found.ot_plug_in:.2f} is no better than {name} {other:.2f}")
        return wrong

    def score(self, aim: Aim) -> float:
        """How near the means over the seeds are to the aim; 1 and more is there."""
        closed, worse = self.spread("gap_closed"), self.spread("emulator_worse_by")
        return aim.score(closed.mean, worse.mean) if closed and worse else float("-inf")


@dataclass(frozen=True)
class Study:
    """All that a report is made of."""

    title: str
    about: Sequence[str]
    """What was measured on what, a line each."""
    centre: Measured
    axes: Mapping[str, Sequence[Measured]]
    """`methods`, `positions`, `compressions`, `layers`, `distilled` and `extra`; the centre is among each."""
    aim: Aim = Aim()
    efficiency: Mapping[str, Any] | None = None
    """What `jobs.benchmark efficiency` left."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """What `jobs.evaluate` left."""

    def along(self, axis: str) -> Sequence[Measured]:
        """The rows of an axis; the centre alone where it was not varied."""
        return self.axes.get(axis) or [self.centre]

    @property
    def rows(self) -> list[Measured]:
        """Every configuration once, the centre first."""
        found = {self.centre.label: self.centre}
        for rows in self.axes.values():
            found |= {row.label: row for row in rows}
        return list(found.values())

    @property
    def best(self) -> Measured | None:
        """The configuration nearest to the aim; None where none has a gap to close."""
        measured = [row for row in self.rows if row.spread("gap_closed") is not None]
        return max(measured, key=lambda row: row.score(self.aim), default=None)
