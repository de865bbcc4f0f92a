"""The quality gate: which figures pass, which do not, and what is said of either."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ot_ray.evaluation import GateConfig, Measured, judge

TEXT = "digest-512"


def current(emulated: float = 20.0, text: str = TEXT) -> Measured:
    return Measured(full=10.0, emulated=emulated, text=text, version="e-1")


@pytest.mark.parametrize(
    ("emulated", "min_gap", "passed"),
    [(10.0, 0.0, True), (9.99, 0.0, False), (10.2, 0.02, True), (10.19, 0.02, False), (11.0, 0.02, True)],
)
def test_the_emulator_must_be_worse_than_the_full_model(emulated: float, min_gap: float, passed: bool) -> None:
    verdict = judge(GateConfig(min_gap=min_gap), {"full": 10.0, "emulated": emulated}, TEXT, None)
    assert verdict.passed is passed
    assert bool(verdict.reasons) is not passed
    if not passed:
        assert f"{emulated:.4g}" in verdict.reasons[0] and "gate.min_gap" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("emulated", "limit", "passed"),
    [(20.0, 0.0, True), (20.1, 0.0, False), (21.0, 0.05, True), (21.1, 0.05, False), (15.0, 0.0, True)],
)
def test_it_must_not_be_worse_than_the_release(emulated: float, limit: float, passed: bool) -> None:
    verdict = judge(GateConfig(max_regression=limit), {"full": 10.0, "emulated": emulated}, TEXT, current())
    assert verdict.passed is passed
    if not passed:
        (reason,) = verdict.reasons
        assert "release e-1" in reason and "raise gate.max_regression and set retry=true" in reason


def test_a_regression_counts_only_where_it_is_asked_for() -> None:
    assert judge(GateConfig(), {"full": 10.0, "emulated": 500.0}, TEXT, current()).passed


def test_another_text_is_not_compared_and_that_is_said() -> None:
    figures = {"full": 10.0, "emulated": 500.0}
    verdict = judge(GateConfig(max_regression=0.0), figures, TEXT, current(text="another"))
    assert verdict.passed
    assert any("another text" in note for note in verdict.notes)


def test_a_first_release_has_nothing_to_be_compared_with() -> None:
    verdict = judge(GateConfig(max_regression=0.0), {"full": 10.0, "emulated": 500.0}, TEXT, None)
    assert verdict.passed
    assert any("nothing to compare" in note for note in verdict.notes)


def test_both_reasons_are_named() -> None:
    verdict = judge(GateConfig(min_gap=1.5, max_regression=0.0), {"full": 10.0, "emulated": 21.0}, TEXT, current(20.0))
    assert len(verdict.reasons) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["full", "emulated"])
def test_figures_that_are_not_finite_fail(which: str, value: float) -> None:
    verdict = judge(GateConfig(), {"full": 10.0, "emulated": 11.0, which: value}, TEXT, None)
    assert not verdict.passed
    assert which in verdict.reasons[0] and "look at validation.source" in verdict.reasons[0]


def test_without_held_out_text_it_passes_and_says_so() -> None:
    verdict = judge(GateConfig(), {}, TEXT, current())
    assert verdict.passed
    assert "nothing was measured" in verdict.notes[0]


@pytest.mark.parametrize("values", [{"min_gap": -0.1}, {"max_regression": -1}, {"min_gap": float("nan")}])
def test_shares_are_not_negative(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GateConfig(**values)  # type: ignore[arg-type]
