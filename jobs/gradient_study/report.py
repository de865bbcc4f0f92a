"""The page of the study, ready for a log of experiments, with its tables as CSV, its chart and all figures as JSON.

What stands in tables is tables.py's."""

from __future__ import annotations

import json

from jobs.gradient_study import chart, tables
from jobs.gradient_study.outcome import Outcome
from ot_ray.evaluation.study.tables import Table
from ot_ray.store import Store


def write_report(outcome: Outcome, store: Store) -> str:
    """Write `study.md`, `study.json`, `chart.png` and a CSV file a table.

    Returns:
        The page's key.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StoreError: the store does not take them.
    """
    page, written = _page(outcome)
    for table in written:
        store.write(f"{table.name}.csv", table.csv())
    store.write("chart.png", chart.draw(outcome))
    store.write("study.json", (json.dumps(outcome.plain(), indent=2) + "\n").encode())
    store.write("study.md", page.encode())
    return "study.md"


def _page(outcome: Outcome) -> tuple[str, list[Table]]:
    who, main, share = tables.customers(outcome), tables.intervals(outcome), tables.shares(outcome)
    some, every, runs = tables.by_customer(outcome, False), tables.by_customer(outcome, True), tables.runs(outcome)
    lines = [
        f"# Gradient learning beside back-propagation: {len(outcome.customers)} customers on {outcome.model}",
        *("", _about(outcome), "", who.markdown()),
        *("", "## Perplexity by interval", "", "Mean over customers, on test text."),
        *("", main.markdown(), "", *_checks(outcome), *_gaps(outcome)),
        *("", "![mean perplexity by interval](chart.png)"),
        *("", "Lines across are back-propagation's: joint beside joint, alone beside the other modes."),
        *("", "Share of what LoRA by back-propagation gains (joint beside joint, the other modes beside alone):"),
        *("", share.markdown()),
        *("", "## By customer", "", f"Interval {outcome.config.intervals[0]}, unmerged; means over the seeds."),
        *("", some.markdown()),
        *("", "## Rates", "", _chosen(outcome), "", runs.markdown()),
        *("", "## Every row by customer", "", every.markdown()),
    ]
    return "\n".join(lines) + "\n", [who, main, share, some, every, runs]


def _about(outcome: Outcome) -> str:
    config, training = outcome.config, outcome.config.training
    tokens = training.steps * training.rows * config.sequence_length
    return (
        f"Every run sees the same {training.steps} batches of {training.rows} sequences of {config.sequence_length} "
        f"tokens of each customer ({tokens:,} tokens each), in an order that the seed decides; with an interval of I "
        "it makes a fit of every I batches, so that longer intervals make fewer fits of the same text. Auxiliaries, "
        f"and LoRA, stand beside {', '.join(training.sites)}; rank {training.rank}, alpha {training.alpha:g}; AdamW "
        "without decay, the rate falling linearly to 0. `joint`: one for all customers; `alone`: each its own; "
        "`collaboration`: all texts go through the mean of all, each of which is fitted to its own customer's. "
        f"Perplexity is that of at most {config.limit} sequences of each customer's test text, of which nothing stands "
        f"in any training text. Seeds {', '.join(map(str, config.seeds))}; a cell is their mean, with the smallest and "
        "the largest in brackets."
    )


def _chosen(outcome: Outcome) -> str:
    said = (
        "Chosen by the mean perplexity on validation text with the first seed, for each row by itself; merged rows "
        "have the rates of their unmerged ones."
    )
    ends = outcome.at_an_end()
    if ends:
        said += f" At an end of what was to choose from: {'; '.join(row.label for row in ends)}."
    return said


def _checks(outcome: Outcome) -> list[str]:
    merging, fitting = outcome.merging_changes(), outcome.fitting_changes()
    lines = []
    if fitting is not None:
        lines.append(
            "- Gradient learning of low rank with interval 1 starts as LoRA does and differs from its perplexity "
            f"for any customer and seed by at most {fitting:.1e} of it."
        )
    if merging is not None:
        lines.append(f"- Merged rows differ from unmerged ones for any customer and seed by at most {merging:.1e}.")
    return lines


def _gaps(outcome: Outcome) -> list[str]:
    return [f"- not measured: {row.label}, seed {seed}: {why}" for row, seed, why in outcome.failures()]
