"""Tables of what other verbs measured: `jobs.benchmark efficiency` and `jobs.evaluate`, from the files they leave.

Beside each figure stands the paper's, where model, batch and length are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ot_ray.evaluation.five_settings import SETTINGS
from ot_ray.evaluation.harness.scoring import TaskScore
from ot_ray.evaluation.study import published
from ot_ray.evaluation.study.tables import Table

Evaluation = Mapping[str, Any]
"""What `jobs.evaluate` leaves: `task_scores.json`, or `five_settings.json` of images."""

_MIB = 2**20


def efficiency(found: Mapping[str, Any] | None) -> Table | None:
    """Table 6 from a benchmark's result; None where there is none."""
    if found is None:
        return None
    head = ["model", "side", "batch", "tokens/s", "to FT", "peak memory (MiB)", "of FT"]
    head += ["published: tokens/s", "published: to FT", "published: memory (MiB)", "published: of FT"]
    rows = []
    for shape, result in found["results"].items():
        known = published.TABLE_6.get(_known(shape, published.TABLE_6) or "", {})
        full = result["sides"].get("FT")
        for side, cost in result["sides"].items():
            measured = (cost["batch_size"], result["sequence_length"])
            paper = known if measured == published.TABLE_6_STEP else {}
            beside = _published(paper.get(side), paper.get("FT"))
            rows.append([shape, side, str(cost["batch_size"]), *_costs(cost, full), *beside])
    return Table("table6", head, rows)


def small_models(evaluations: Sequence[Evaluation]) -> Table | None:
    """Table 1 from scores on tasks of any model that is not of Table 2; None where there are none."""
    found = [one for one in _scored(evaluations) if _known(str(one["model"]), published.TABLE_2) is None]
    return _scores(found, published.TABLE_1, "table1_tasks")


def large_models(evaluations: Sequence[Evaluation]) -> Table | None:
    """Table 2 from scores on tasks of its models; None where there are none."""
    found = [one for one in _scored(evaluations) if _known(str(one["model"]), published.TABLE_2) is not None]
    return _scores(found, published.TABLE_2, "table2")


def images(evaluations: Sequence[Evaluation]) -> Table | None:
    """Table 3 from accuracies on images, a column an evaluation; None where there are none."""
    found = [one for one in evaluations if one.get("measure") == "accuracy"]
    if not found:
        return None
    rows = [[label, *(f"{one[name]:.1%}" for one in found)] for name, label in SETTINGS.items()]
    return Table("table3", ["setting", *map(_column, found)], rows)


def _column(one: Evaluation) -> str:
    """What tells an evaluation on images from the others; of a file that does not say, its title."""
    parts = [str(one[name]) for name in ("model", "data", "method") if one.get(name)]
    return ", ".join(parts) if "data" in one else str(one["title"])


def readable(evaluation: Evaluation) -> bool:
    """Whether this is what `jobs.evaluate` leaves of tasks or of images."""
    if evaluation.get("measure") == "accuracy":
        return "title" in evaluation and all(isinstance(evaluation.get(name), float | int) for name in SETTINGS)
    return "model" in evaluation and any(
        isinstance(evaluation.get(name), Mapping) and isinstance(evaluation[name].get("tasks"), Mapping)
        for name in SETTINGS
    )


def _scored(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    return [one for one in evaluations if "measure" not in one]


def _scores(
    evaluations: Sequence[Evaluation], table: Mapping[str, Mapping[str, published.TextFigures]], name: str
) -> Table | None:
    if not evaluations:
        return None
    tasks = list(dict.fromkeys(task for one in evaluations for row in _settings(one).values() for task in row["tasks"]))
    head = ["model", "setting", *tasks, "mean", "published: WikiText perplexity", "published: mean of eight tasks"]
    rows = []
    for one in evaluations:
        paper = table.get(_known(str(one["model"]), table) or "", {})
        for setting, row in _settings(one).items():
            cells = [_score(row["tasks"].get(task)) for task in tasks]
            figures = paper.get(setting, published.TextFigures(None, None))
            beside = [_number(figures.perplexity, ".2f"), _number(figures.mean, ".1f")]
            rows.append([str(one["model"]), SETTINGS[setting], *cells, _number(row["mean"], ".1f"), *beside])
    return Table(name, head, rows)


def _settings(evaluation: Evaluation) -> dict[str, Mapping[str, Any]]:
    return {name: evaluation[name] for name in SETTINGS if name in evaluation}


def _score(score: Mapping[str, Any] | None) -> str:
    """The metric of a task that the paper shows: accuracies in percent, others as they are."""
    if score is None:
        return ""
    found = TaskScore.model_validate({"task": "", **score})
    value = found.metrics[found.main]
    return f"{100 * value:.1f}" if found.higher_is_better[found.main] else f"{value:.2f}"


def _costs(cost: Mapping[str, Any], full: Mapping[str, Any] | None) -> list[str]:
    if "failed" in cost:
        return ["failed", "", "", ""]
    speed, memory = cost["tokens_per_s"], cost["peak_bytes"]
    cells = [f"{speed:,.0f}", "", f"{memory / _MIB:,.0f}", ""]
    if full is not None and "failed" not in full:
        cells[1] = f"{speed / full['tokens_per_s']:.2f}"
        # Memory grows with the batch, and says nothing beside another one.
        if cost["batch_size"] == full["batch_size"]:
            cells[3] = f"{memory / full['peak_bytes']:.2f}"
    return cells


def _published(cost: published.Cost | None, full: published.Cost | None) -> list[str]:
    if cost is None or full is None:
        return [""] * 4
    speed, memory = cost.tokens_per_s / full.tokens_per_s, cost.memory_mib / full.memory_mib
    return [f"{cost.tokens_per_s:,.0f}", f"{speed:.2f}", f"{cost.memory_mib:,.0f}", f"{memory:.2f}"]


def _known(name: str, table: Mapping[str, Any]) -> str | None:
    """The published model that a name of ours means: the one whose name it holds, whatever the case."""
    return next((model for model in table if model.split()[0].lower() in name.lower()), None)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
