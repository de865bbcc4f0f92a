"""Tune the adapter of a bundle on private data: on the customer's own machine, or as an isolated Ray job.

It reads a bundle and one data set, writes an adapter, and needs the base install only, but for a search."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.command import config_file, run_command
from jobs.images.tuning import ImageWork
from jobs.limits import require_empty, require_folder
from jobs.tuning.config import TuneConfig
from jobs.tuning.search import tune_with_search
from jobs.tuning.work import Work, open_work, tune_adapter
from ot_ray.progress import Progress
from ot_ray.store import open_store, upload_folder
from ot_ray.training import Checkpoints

__all__ = ["TuneConfig", "run"]


def run(config: TuneConfig) -> dict[str, Any]:
    """Tune the adapter of a bundle and write what was tuned."""
    require_empty("output", config.output)
    if config.search is not None and config.search.report is not None:
        require_folder("search.report", config.search.report)
    with tempfile.TemporaryDirectory() as temporary:
        work = open_work(config, Path(temporary) / "bundle")
        folder = Path(temporary) / "adapter"
        tune = tune_with_search if config.search is not None else _tune_here
        tuned = tune(work, config, folder)
        upload_folder(open_store(config.output), folder, "", last="manifest.json")
    return {
        "adapter": config.output,
        "bundle_id": work.bundle.bundle_id,
        "method": config.method,
        **work.figures,
        **tuned,
    }


def _tune_here(work: Work | ImageWork, config: TuneConfig, folder: Path) -> dict[str, Any]:
    with Progress("tune", config.training.steps) as bar:
        return tune_adapter(
            work,
            config,
            folder,
            checkpoints=_checkpoints(work, config),
            report=lambda figures: bar.at(int(figures["step"]), **_shown(figures)),
        )


def _shown(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figures[name] for name in ("loss", "tokens_per_s", "images_per_s") if name in figures}


def _checkpoints(work: Work | ImageWork, config: TuneConfig) -> Checkpoints | None:
    if config.checkpoints is None:
        return None
    same = config.model_dump(mode="json", include={"method", "lora", "bottleneck", "training", "sequence_length"})
    return Checkpoints(
        open_store(config.checkpoints),
        "tune",
        {**same, "bundle_id": work.bundle.bundle_id, "data_digest": work.digest},
        keep=config.training.keep_checkpoints,
        patience_s=config.training.store_patience_s,
    )


if __name__ == "__main__":
    run_command("tune", TuneConfig, run, default_config=config_file("tune.yaml"))
