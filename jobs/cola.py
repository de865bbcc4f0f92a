"""Gradient learning: one frozen base model, and many customers' auxiliaries fitted to its gradients (ColA).

It needs the base install only, but for workers, which are Ray's."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from jobs.command import config_file, run_command
from jobs.gradient_learning.config import COLLABORATION, ColaConfig
from jobs.gradient_learning.exporting import write_results
from jobs.gradient_learning.reporting import require_chart, write_report
from jobs.gradient_learning.running import learn_by_group, learn_here
from jobs.gradient_learning.work import Work, open_work
from jobs.limits import require_empty, require_folder
from ot_ray.artifacts.manifest import MANIFEST
from ot_ray.cola import JOINT
from ot_ray.store import open_store, upload_folder
from ot_ray.training import TrainingResult

__all__ = ["ColaConfig", "run"]


def run(config: ColaConfig) -> dict[str, Any]:
    """Fit customers' auxiliaries to the gradients of a frozen base model, and write what was learnt."""
    _require_unfinished(config)
    if config.report is not None:
        require_folder("report", config.report)
        require_chart()
    with tempfile.TemporaryDirectory() as temporary:
        work = open_work(config, Path(temporary))
        result, states = (learn_here if config.base_workers is None else learn_by_group)(config, work)
        folder = Path(temporary) / "results"
        told = _told(work, config, result)
        owners = write_results(folder, work, config, states, told)
        upload_folder(open_store(config.output), folder, "", last=MANIFEST)
    if config.report is not None:
        write_report(Path(config.report), config, result, told)
    return {"output": config.output, **told, "owners": owners}


def _require_unfinished(config: ColaConfig) -> None:
    """Refuse an output that holds something else than what a run with checkpoints left half written."""
    own = (JOINT, COLLABORATION, *(customer.name for customer in config.everybody))
    held = [] if config.checkpoints is None else list(open_store(config.output).list())
    if not held or MANIFEST in held or not all(key.startswith(tuple(f"{name}/" for name in own)) for key in held):
        require_empty("output", config.output)


def _told(work: Work, config: ColaConfig, result: TrainingResult) -> dict[str, Any]:
    """Figures of the whole run, as JSON values."""
    last = result.history[-1]
    first, end = (result.evaluations[0], result.evaluations[-1]) if result.evaluations else ({}, {})
    customers = {}
    for name, text in work.text.items():
        key = f"validation_loss/{name}"
        customers[name] = {
            "sequences": len(text.train),
            "tokens": text.tokens,
            "loss": last.get(f"loss/{name}"),
            "perplexity_before": math.exp(first[key]) if key in first else None,
            "perplexity": math.exp(end[key]) if key in end else None,
        }
    waited, seconds = (sum(figures[name] for figures in result.history) for name in ("fit_wait", "seconds"))
    return {
        "model": config.model.name,
        "mode": config.mode,
        "steps": int(last["step"]),
        "loss": last["loss"],
        "refused": int(last["refused"]),
        "fit_wait_share": waited / seconds,
        "customers": customers,
    }


if __name__ == "__main__":
    run_command("cola", ColaConfig, run, default_config=config_file("cola.yaml"))
