"""Scores of the settings on tasks of the harness: what is not in the cache is computed side by side on Ray.

Which model a setting is, is models.py's; how one is scored, the evaluation room's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.evaluation.config import EvaluateConfig, Setting, TaskEvaluation
from jobs.evaluation.models import Models
from jobs.evaluation.places import reachable
from jobs.limits import require_kind
from ot_ray.data.tasks import load_task, splits_of
from ot_ray.errors import ConfigError, LaunchError
from ot_ray.evaluation.harness import ScoreCache, TaskScore, TaskTable, score, task_identity
from ot_ray.evaluation.harness.cache import identity_key
from ot_ray.launch import ray_cluster
from ot_ray.launch.pieces import Piece, run_pieces
from ot_ray.progress import Progress
from ot_ray.store import open_store


@dataclass(frozen=True)
class Cell:
    """One score of the table."""

    setting: Setting
    task: str
    weights: dict[str, Any]
    """`Models.identity`."""
    asked: dict[str, Any]
    """`task_identity`."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the score."""
        return {"weights": self.weights, "asked": self.asked}

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.setting} on {self.task}"


@dataclass(frozen=True)
class Scores:
    """The table, and how it came about."""

    table: TaskTable
    computed: int
    """How many scores were computed; the others were there."""


def score_settings(config: EvaluateConfig) -> Scores:
    """Score the settings of `config.harness` on its tasks.

    Raises:
        ConfigError, DataError, MissingDependencyError: a task, its data, an adapter or a training text is not there,
            before any model is loaded.
        LaunchError: some scores could not be computed; it names them, and the others are in the cache.
    """
    config = reachable(config)
    tasks = config.harness
    assert tasks is not None
    cells = _cells(config, tasks)
    cache = ScoreCache(open_store(tasks.cache))
    found = {cell.name: kept for cell in cells if (kept := cache.get(cell.identity)) is not None}
    missing = [cell for cell in cells if cell.name not in found]
    if missing:
        found |= _compute(config, tasks, missing)
    rows = {setting: {task: found[f"{setting} on {task}"] for task in tasks.tasks} for setting in tasks.settings}
    return Scores(TaskTable(rows), len(missing))


def _cells(config: EvaluateConfig, tasks: TaskEvaluation) -> list[Cell]:
    # The cheapest to be wrong comes first: names and data of tasks, then what is read of models.
    asked = {name: _asked(config, tasks, name) for name in tasks.tasks}
    with tempfile.TemporaryDirectory() as temporary:
        models = Models(config, Path(temporary))
        require_kind(models.source.config.model_type, "harness", images=False)
        return [
            Cell(setting, task, models.identity(setting, task), asked[task])
            for setting in tasks.settings
            for task in tasks.tasks
        ]


def _asked(config: EvaluateConfig, tasks: TaskEvaluation, name: str) -> dict[str, Any]:
    task = load_task(name, tasks.tasks_folder)
    if "full_fine_tuned" in tasks.settings and config.train is None and "train" not in splits_of(task):
        raise ConfigError(
            f"task {name} has no training examples of its own, on which full_fine_tuned would be trained; set "
            "train.source=... to a text for all tasks, or leave full_fine_tuned out of harness.settings=[...]"
        )
    return task_identity(task, tasks.num_fewshot, tasks.limit)


def _compute(config: EvaluateConfig, tasks: TaskEvaluation, missing: Sequence[Cell]) -> dict[str, TaskScore]:
    pieces = _pieces(config, tasks, missing)
    found: dict[str, TaskScore] = {}
    failed: dict[str, str] = {}

    def take(piece: Piece, outcome: Any) -> None:
        for name, (kept, reason) in (outcome or {}).items():
            if kept is not None:
                found[name] = TaskScore.model_validate(kept)
            else:
                failed[name] = reason
        bar.at(len(found) + len(failed))

    workers = tasks.workers
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    with ray_cluster(tasks.address), Progress("score", len(missing), "score") as bar:
        # The harness draws a bar for each of its steps, and workers have no terminal.
        lost = run_pieces(pieces, resources, take, {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"})
    failed |= {name: reason for piece in pieces for name in piece.payload["names"] if (reason := lost.get(piece.name))}
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise LaunchError(
            f"{len(failed)} of {len(missing)} scores could not be computed, and the others are kept in {tasks.cache}, "
            f"so that the next run goes on from there: {reasons}"
        )
    return found


def _pieces(config: EvaluateConfig, tasks: TaskEvaluation, missing: Sequence[Cell]) -> list[Piece]:
    """Full fine-tunings first, each once; then shares of the cells of equal weights."""
    plain = config.model_dump(mode="json")
    groups: dict[str, list[Cell]] = {}
    for cell in missing:
        groups.setdefault(identity_key(cell.weights), []).append(cell)
    trainings, scorings = [], []
    for key, cells in groups.items():
        after = None
        if cells[0].setting == "full_fine_tuned":
            after = f"training {key}"
            payload = {"config": plain, "task": cells[0].task, "weights": cells[0].weights, "names": []}
            trainings.append(Piece(after, train_reference, payload))
        for share in _shares(cells, tasks.workers.tasks_each):
            wanted = [{"setting": cell.setting, "task": cell.task, "identity": cell.identity} for cell in share]
            names = [cell.name for cell in share]
            payload = {"config": plain, "cells": wanted, "names": names}
            scorings.append(Piece(", ".join(names), score_share, payload, (after,) if after else ()))
    return [*trainings, *scorings]


def _shares(cells: Sequence[Cell], size: int) -> Iterable[Sequence[Cell]]:
    return (cells[start : start + size] for start in range(0, len(cells), size))


def train_reference(payload: dict[str, Any]) -> None:
    """On a worker: train the reference of one task, and keep its weights."""
    config = _configured(payload)
    assert config.harness is not None
    with tempfile.TemporaryDirectory() as temporary:
        Models(config, Path(temporary)).fine_tune(payload["task"], payload["weights"], open_store(config.harness.cache))


def score_share(payload: dict[str, Any]) -> dict[str, tuple[dict[str, Any] | None, str]]:
    """On a worker: score one model on one or several tasks, and keep each score as soon as it is there.

    Returns:
        The score, or None and why there is none, by the cell's name.
    """
    config, cells = _configured(payload), payload["cells"]
    tasks = config.harness
    assert tasks is not None
    store = open_store(tasks.cache)
    with tempfile.TemporaryDirectory() as temporary:
        models = Models(config, Path(temporary))
        setting = cells[0]["setting"]
        tokenizer = models.tokenizer(setting)
        model = models.load(setting, cells[0]["task"], cells[0]["identity"]["weights"], store)
        if tasks.workers.gpus and torch.cuda.is_available():
            model.to(torch.device("cuda"))  # type: ignore[arg-type] - a wrapper's stub
        outcome: dict[str, tuple[dict[str, Any] | None, str]] = {}
        for name, cell in zip(payload["names"], cells, strict=True):
            try:
                kept = _score_cell(tasks, model, tokenizer, cell, ScoreCache(store))
                outcome[name] = kept.model_dump(mode="json"), ""
            except Exception as error:
                # The functions of a task raise whatever they like; the other tasks shall be scored all the same.
                outcome[name] = None, f"{type(error).__name__}: {error}"
    return outcome


def _score_cell(
    tasks: TaskEvaluation, model: Any, tokenizer: Any, cell: dict[str, Any], cache: ScoreCache
) -> TaskScore:
    task = load_task(cell["task"], tasks.tasks_folder)
    if task_identity(task, tasks.num_fewshot, tasks.limit) != cell["identity"]["asked"]:
        raise LaunchError(
            "the task, its data or the harness are not the same on this machine as where the run began; give all "
            "machines the same"
        )
    found = score(model, tokenizer, task, batch_size=tasks.batch_size, num_fewshot=tasks.num_fewshot, limit=tasks.limit)
    cache.put(cell["identity"], found)
    return found


def _configured(payload: dict[str, Any]) -> EvaluateConfig:
    config = EvaluateConfig.model_validate(payload["config"])
    assert config.harness is not None
    torch.set_num_threads(max(1, int(config.harness.workers.cpus)))
    return config
