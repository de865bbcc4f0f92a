"""The learning-rate search of `jobs.tune`: one trial's work, the progress of all, and the files of its report.

How trials are placed and stopped is the launch room's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.images.tuning import ImageWork
from jobs.tuning.chart import draw_search, require_chart
from jobs.tuning.config import TuneConfig
from jobs.tuning.work import Work, tune_adapter
from ot_ray.launch import Found, SearchConfig, Trial, ray_cluster, search_rates
from ot_ray.progress import Progress
from ot_ray.training.loop import Report


def tune_with_search(work: Work | ImageWork, config: TuneConfig, folder: Path) -> dict[str, Any]:
    """Tune at every rate of the search, and write the winner's adapter into a new folder.

    Returns:
        As `tune_adapter`, of the winner, with its `learning_rate` and `search`: the winner and all curves.

    Raises:
        TrainingError: no trial finished.
        MissingDependencyError: Ray is not installed, or matplotlib, where a report is asked for.
    """
    search = config.search
    assert search is not None
    if search.report is not None:
        require_chart()
    steps = config.training.steps
    with ray_cluster(search.address, dashboard=False), Progress("search", steps * len(search.rates)) as bar:
        found = search_rates(
            tune_at_rate, (work, config), search, steps, show=lambda trials: bar.at(_done(trials), **_best(trials))
        )
    folder.mkdir()
    for name, content in found.outcome["files"].items():
        (folder / name).write_bytes(content)
    result = {**found.outcome["figures"], "learning_rate": found.winner.rate, "search": found.as_dict()}
    return {**result, **_write_report(found, search)}


def tune_at_rate(payload: tuple[Work | ImageWork, TuneConfig], rate: float, report: Report) -> dict[str, Any]:
    """One trial: the adapter tuned at this rate, as bytes by file name, and its figures."""
    work, config = payload
    training = config.training.model_copy(update={"lr": rate})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        figures = tune_adapter(work, config.model_copy(update={"training": training}), folder, report=report)
        return {"figures": figures, "files": {path.name: path.read_bytes() for path in sorted(folder.iterdir())}}


def _done(trials: Sequence[Trial]) -> int:
    return sum(trial.step for trial in trials)


def _best(trials: Sequence[Trial]) -> dict[str, float]:
    seen = [(trial.curve[-1]["validation_loss"], trial.rate) for trial in trials if trial.curve]
    return dict(zip(("validation_loss", "rate"), min(seen), strict=True)) if seen else {}


def _write_report(found: Found, search: SearchConfig) -> dict[str, str]:
    if search.report is None:
        return {}
    folder = Path(search.report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "search.png").write_bytes(draw_search(found))
    return {"report": str(folder)}
