"""The paper's Table 1: settings as rows, tasks as columns, and the mean of its eight, for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ot_ray.evaluation.five_settings import SETTINGS
from ot_ray.evaluation.harness.config import PAPER_TASKS
from ot_ray.evaluation.harness.scoring import TaskScore


@dataclass(frozen=True)
class TaskTable:
    """Scores by setting, then by task; a setting or task that was not asked for is not there."""

    scores: Mapping[str, Mapping[str, TaskScore]]

    def mean(self, setting: str) -> float | None:
        """Mean of one setting's accuracies in percent, over those of the paper's eight tasks that were scored, or
        else over all tasks in which higher is better; None without any."""
        row = self.scores[setting]
        counted = [row[task] for task in self._counted() if task in row]
        return sum(100 * one.metrics[one.main] for one in counted) / len(counted) if counted else None

    def text(self) -> str:
        """Accuracies in percent with their standard error, perplexities as they are."""
        columns = self._columns()
        counted = self._counted()
        label = f"mean of {len(counted)}"
        head = ["setting", *(f"{task} ({self._metric(task)})" for task in columns), *([label] if counted else [])]
        lines = [head]
        for setting, row in self.scores.items():
            mean = self.mean(setting)
            shown = [f"{mean:.1f}" if mean is not None else "-"] if counted else []
            lines.append([SETTINGS[setting], *(_cell(row.get(task)) for task in columns), *shown])
        widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(_aligned(line, widths) for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """Every metric of every score, and the means."""
        return {
            setting: {
                "tasks": {task: one.model_dump(mode="json", exclude={"task"}) for task, one in row.items()},
                "mean": self.mean(setting),
                "mean_of": [task for task in self._counted() if task in row],
            }
            for setting, row in self.scores.items()
        }

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.scores.values() for task in row))

    def _metric(self, task: str) -> str:
        return next(row[task].main for row in self.scores.values() if task in row)

    def _counted(self) -> list[str]:
        columns = self._columns()
        paper_s = [task for task in columns if task in PAPER_TASKS]
        return paper_s or [task for task in columns if any(_is_share(row.get(task)) for row in self.scores.values())]


def _is_share(one: TaskScore | None) -> bool:
    return one is not None and one.higher_is_better[one.main] is True


def _cell(one: TaskScore | None) -> str:
    if one is None:
        return "-"
    value, error = one.metrics[one.main], one.stderr[one.main]
    if not _is_share(one):
        return f"{value:.2f}"
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def _aligned(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]).rstrip()
