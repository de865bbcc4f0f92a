"""The tables of the study: over intervals, by customer, and what each run had.

The figures in them are outcome.py's, the words around them report.py's."""

from __future__ import annotations

import math

from jobs.gradient_study.config import Row
from jobs.gradient_study.outcome import Outcome
from ot_ray.evaluation.study import Spread
from ot_ray.evaluation.study.tables import Table


def customers(outcome: Outcome) -> Table:
    """Who they are."""
    rows = []
    for customer in outcome.config.customers:
        zero = "" if outcome.zero is None else f"{outcome.zero['test'][customer.name]:.2f}"
        text = ", ".join(customer.packages) or "Python's language reference"
        rows.append([customer.name, text, f"{outcome.tokens[customer.name]['train']:,}", zero])
    return Table("customers", ["customer", "documentation of", "tokens to learn from", "perplexity of the base"], rows)


def intervals(outcome: Outcome) -> Table:
    """Mean perplexity over customers of every row, a column an interval."""
    steps = outcome.config.intervals
    rows = [
        [row.label, _text(outcome.mean(row)), *[""] * (len(steps) - 1)]
        for row in outcome.found
        if row.method != "gradient"
    ]
    for first in (row for row in outcome.found if row.method == "gradient" and row.interval == steps[0]):
        cells = [_text(outcome.mean(first.model_copy(update={"interval": step}))) for step in steps]
        rows.append([_name(first), *cells])
    if outcome.untouched is not None:
        rows.insert(0, ["the base as it is", f"{outcome.untouched:.2f}", *[""] * (len(steps) - 1)])
    return Table("intervals", ["", *(f"interval {step}" for step in steps)], rows)


def shares(outcome: Outcome) -> Table:
    """What share of LoRA's gain by back-propagation each row has."""
    steps = outcome.config.intervals
    rows = []
    for first in (row for row in outcome.found if row.method == "gradient" and row.interval == steps[0]):
        if not first.merged:
            same = [first.model_copy(update={"interval": step}) for step in steps]
            rows.append([_name(first), *(_text(outcome.closed(row), ".0%") for row in same)])
    full = (row for row in outcome.found if row.method == "full")
    rows += [[row.label, _text(outcome.closed(row), ".0%"), *[""] * (len(steps) - 1)] for row in full]
    return Table("shares", ["", *(f"interval {step}" for step in steps)], rows)


def by_customer(outcome: Outcome, every: bool) -> Table:
    """Mean perplexity over the seeds of each customer.

    Args:
        every: every row; else those of the first interval, unmerged.
    """
    names = outcome.customers
    chosen = [row for row in outcome.found if every or (_first(outcome, row) and not row.merged)]
    rows = [[row.label, *(_mean(outcome.of(row, name)) for name in names), _mean(outcome.mean(row))] for row in chosen]
    if outcome.zero is not None:
        values = [f"{outcome.zero['test'][name]:.2f}" for name in names]
        rows.insert(0, ["the base as it is", *values, f"{outcome.untouched:.2f}"])
    return Table("rows" if every else "customers_rows", ["", *names, "mean"], rows)


def runs(outcome: Outcome) -> Table:
    """The rate that validation text chose, and what it was made with."""
    rows = []
    for row, one in outcome.found.items():
        if row.merged:
            continue
        result = next(iter(one.results.values()), None)
        tried = ", ".join(
            f"{lr:g}: {f'{value:.2f}' if math.isfinite(value) else 'failed'}" for lr, value in sorted(one.tried.items())
        )
        made = ["", ""] if result is None else [f"{result['fits']}", f"{result['trained']:,}"]
        rows.append([row.label, "" if one.lr is None else f"{one.lr:g}", *made, tried])
    head = ["", "learning rate", "fits", "parameters that learn", "perplexity on validation text by rate"]
    return Table("rates", head, rows)


def _first(outcome: Outcome, row: Row) -> bool:
    return row.method != "gradient" or row.interval == outcome.config.intervals[0]


def _name(row: Row) -> str:
    return f"{row.mode}, {row.kind}{', merged' if row.merged else ''}"


def _mean(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.mean:.2f}"


def _text(spread: Spread | None, form: str = ".2f") -> str:
    return "" if spread is None else spread.text(form)
