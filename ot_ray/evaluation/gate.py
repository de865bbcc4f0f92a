"""Whether an emulator may be published: far enough behind the full model, no worse a stand-in than the last one.

Measuring the perplexities, and acting on the verdict, is left to others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ot_ray.config import Config


class GateConfig(Config):
    """What an emulator must show on the held-out text before its bundle is published."""

    min_gap: float = Field(default=0.0, ge=0)
    """How much worse than the full model the emulator must be, so that it does not replace it: its perplexity must
    be at least the full model's times 1 + this share."""
    max_regression: float | None = Field(default=None, ge=0)
    """How much worse than the current release the emulator may be, as a share of the release's perplexity (0 is not
    at all): the emulated model with the untuned adapter stands in for what customers will tune. Compared only where
    both were measured on the same text; unset, never."""

    def least(self, full: float) -> float:
        """The perplexity that an emulator of a model with this perplexity must at least have."""
        return full * (1 + self.min_gap)


class Measured(Config):
    """Perplexities of one emulator on one held-out text."""

    full: float
    """Of the full model."""
    emulated: float
    """Of the emulated model with the untuned adapter."""
    text: str
    """What identifies the held-out text and how it was cut: only equal ones are compared."""
    version: str | None = None
    """The bundle's version; for messages."""


class Verdict(Config):
    """What the gate says."""

    passed: bool
    """Whether the bundle may be published."""
    reasons: tuple[str, ...]
    """Why not; empty where it passed."""
    notes: tuple[str, ...]
    """What was compared, or could not be."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return self.model_dump(mode="json")


def judge(gate: GateConfig, found: Mapping[str, float], text: str, current: Measured | None) -> Verdict:
    """Hold an emulator against the full model and the current release.

    Args:
        found: perplexities `full` and `emulated`; empty where none were measured, which passes with a note.
        text: as `Measured.text`.
        current: the current release; None if there is none, or nothing is known of it.
    """
    if not found:
        return Verdict(passed=True, reasons=(), notes=("no held-out text was given, so nothing was measured",))
    full, emulated = found["full"], found["emulated"]
    broken = [f"perplexity {name} is {found[name]}" for name in ("full", "emulated") if not math.isfinite(found[name])]
    if broken:
        reason = f"{' and '.join(broken)}; look at validation.source and the run's report"
        return Verdict(passed=False, reasons=(reason,), notes=())
    reasons, notes = (
        [],
        [f"the emulator's perplexity is {emulated:.4g}, {_share(emulated, full)} the full model's {full:.4g}"],
    )
    if emulated < gate.least(full):
        reasons.append(
            f"the emulator's perplexity is {emulated:.4g}, and the full model's {full:.4g}: it must be at least "
            f"{gate.least(full):.4g} (gate.min_gap {gate.min_gap:g}), or the emulator can replace the model; "
            "keep fewer layers or distil less"
        )
    if gate.max_regression is not None:
        reason, note = _against(emulated, text, current, gate.max_regression)
        reasons += [reason] if reason else []
        notes += [note] if note else []
    return Verdict(passed=not reasons, reasons=tuple(reasons), notes=tuple(notes))


def _against(emulated: float, text: str, current: Measured | None, limit: float) -> tuple[str | None, str | None]:
    if current is None:
        return None, "no current release with known figures, so nothing to compare with"
    name = f"release {current.version}" if current.version else "the current release"
    if current.text != text:
        return None, f"{name} was measured on another text, so it was not compared"
    most = current.emulated * (1 + limit)
    if emulated > most:
        return (
            f"the emulator's perplexity is {emulated:.4g}, and that of {name} {current.emulated:.4g}: it may be at "
            f"most {most:.4g} (gate.max_regression {limit:g}); train longer, keep more layers, or raise "
            "gate.max_regression and set retry=true"
        ), None
    return (
        None,
        f"the emulator's perplexity is {_share(emulated, current.emulated)} that of {name}, {current.emulated:.4g}",
    )


def _share(value: float, base: float) -> str:
    return f"{value / base:.4g} times"
