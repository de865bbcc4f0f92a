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
from jobs.tuning.hosted import HostedRun
from jobs.tuning.length import TimeLimit, with_steps
from jobs.tuning.search import tune_with_search
from jobs.tuning.work import Work, open_work, tune_adapter
from ot_ray.client import Client, service_of
from ot_ray.progress import Progress
from ot_ray.store import open_store, renewed, upload_folder
from ot_ray.training import Checkpoints

__all__ = ["TuneConfig", "run"]


def run(config: TuneConfig) -> dict[str, Any]:
    """Tune the adapter of a bundle and write what was tuned."""
    if config.events is not None:
        with renewed(open_store(config.output)):
            return _tune_watched(config)
    require_empty("output", config.output)
    if config.search is not None and config.search.report is not None:
        require_folder("search.report", config.search.report)
    limit = TimeLimit(config.time_limit_s)
    with tempfile.TemporaryDirectory() as temporary:
        work, config = _open(config, Path(temporary))
        folder = Path(temporary) / "adapter"
        if config.search is not None:
            tuned = tune_with_search(work, config, folder)
        else:
            tuned = _tune_here(work, config, folder, limit)
        upload_folder(open_store(config.output), folder, "", last="manifest.json")
        sent = _sent(config, folder)
    return {**_told(work, config, tuned), **sent}


def _sent(config: TuneConfig, folder: Path) -> dict[str, Any]:
    """Send the adapter back to the service, and wait for its verdict. Raises AdapterRejectedError, ServiceError."""
    if config.upload is None or config.bundle.url is None:
        return {}
    client = Client(service_of(config.bundle.url)[0])
    return {"model_id": client.upload(folder, config.upload.suffix, wait_s=config.upload.wait_s)}


def _tune_watched(config: TuneConfig) -> dict[str, Any]:
    limit, watched = TimeLimit(config.time_limit_s), HostedRun(config)
    with watched.claim.held():
        if (done := watched.result()) is not None:
            return done
        try:
            with tempfile.TemporaryDirectory() as temporary:
                work, config = _open(config, Path(temporary))
                assert isinstance(work, Work)
                watched.begin(work, config)
                folder = Path(temporary) / "adapter"
                tuned = _tune_here(work, config, folder, limit, watched)
                watched.finish(folder)
        except Exception as error:
            watched.failed(error)
            raise
    return _told(work, config, tuned)


def _open(config: TuneConfig, temporary: Path) -> tuple[Work | ImageWork, TuneConfig]:
    work = open_work(config, temporary / "bundle")
    return work, with_steps(config, work.rows, work.examples)


def _told(work: Work | ImageWork, config: TuneConfig, tuned: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "adapter": config.output,
        "bundle_id": work.bundle.bundle_id,
        "method": config.method,
        **work.figures,
        **tuned,
    }


def _tune_here(
    work: Work | ImageWork, config: TuneConfig, folder: Path, limit: TimeLimit, watched: HostedRun | None = None
) -> dict[str, Any]:
    steps = config.training.steps
    with Progress("tune", steps) as bar:

        def report(figures: Mapping[str, float]) -> None:
            step = int(figures["step"])
            bar.at(step, **_shown(figures))
            if step < steps:
                limit.check(f"after step {step} of {steps}")

        return tune_adapter(
            work,
            config,
            folder,
            checkpoints=_checkpoints(work, config, watched),
            report=report,
            **({} if watched is None else {"hooks": watched.hooks}),
        )


def _shown(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figures[name] for name in ("loss", "tokens_per_s", "images_per_s") if name in figures}


def _checkpoints(work: Work | ImageWork, config: TuneConfig, watched: HostedRun | None) -> Checkpoints | None:
    if config.checkpoints is None:
        return None
    store = open_store(config.checkpoints)
    names = {"method", "lora", "bottleneck", "training", "sequence_length"}
    same = config.model_dump(mode="json", include=names, exclude={"training": {"warmup_share"}})
    return Checkpoints(
        store if watched is None else watched.claim.guard(store),
        "tune",
        {**same, "bundle_id": work.bundle.bundle_id, "data_digest": work.digest},
        keep=config.training.keep_checkpoints,
        patience_s=config.training.store_patience_s,
    )


if __name__ == "__main__":
    run_command(
        "tune",
        TuneConfig,
        run,
        default_config=config_file("tune.yaml"),
        options={"bundle": ("bundle.url={}", "upload={{}}")},
    )
