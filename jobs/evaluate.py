"""The five settings of offsite tuning: perplexities on one test split, and scores on tasks of the
lm-evaluation-harness, each as a table and files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from jobs.command import config_file, run_command
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.scores import score_settings
from jobs.images.evaluation import measure_images
from jobs.limits import require_folder, require_kind, require_length
from ot_ray.artifacts import inspect_adapter, load_full, open_model_source, plain_state
from ot_ray.data import PackedSequence, load_sequences
from ot_ray.evaluation import FiveSettings, perplexity
from ot_ray.model import adapter_state, plug_in
from ot_ray.progress import Progress
from ot_ray.store import download_folder, open_store
from ot_ray.training import TrainingConfig, fit

__all__ = ["EvaluateConfig", "measure", "run"]


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Report the five settings: perplexity on the test split, and scores on tasks.

    Scores are kept by what decides them, so that the same inputs compute nothing the second time.
    """
    require_folder("output", config.output)
    found: dict[str, Any] = {}
    if config.harness is not None:
        found |= _score_tasks(config)
    if config.test is not None or config.test_images is not None:
        report = measure_images(config) if config.test_images is not None else measure(config)
        # First, so that the figures are seen whatever happens to the files.
        print(report.table(), flush=True)
        files = report.write(config.output, f"{config.model.name}: offsite tuning, five settings")
        found |= {"measure": report.measure.name, **report.as_dict(), **files}
    return found


def _score_tasks(config: EvaluateConfig) -> dict[str, Any]:
    scores = score_settings(config)
    text, figures = scores.table.text(), scores.table.as_dict()
    print(text, flush=True)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("txt", text), ("json", json.dumps({"model": config.model.name, **figures}, indent=2))):
        partial = folder / "task_scores.partial"
        partial.write_text(content + "\n", encoding="utf-8")
        os.replace(partial, folder / f"task_scores.{name}")
    return {"tasks": figures, "scores_computed": scores.computed, "task_scores": str(folder / "task_scores.json")}


def measure(config: EvaluateConfig) -> FiveSettings:
    """Compute the five perplexities; full fine-tuning is trained here, for reference."""
    assert config.bundle and config.adapter and config.train and config.test
    source = open_model_source(config.model)
    require_kind(source.config.model_type, "test", images=False)
    tokenizer = source.tokenizer()
    require_length(config.sequence_length, source.config)
    test = load_sequences(config.test, tokenizer, config.sequence_length).sequences
    train = load_sequences(config.train, tokenizer, config.sequence_length).sequences
    model = load_full(config.model, source=source)
    with tempfile.TemporaryDirectory() as temporary:
        bundle = config.bundle.open(Path(temporary) / "bundle")
        plan = bundle.manifest.plan
        folder = Path(temporary) / "adapter"
        download_folder(open_store(config.adapter), "", folder)
        state = plain_state(inspect_adapter(folder, bundle.manifest), adapter_state(model, plan))
        emulated = bundle.load_model()
    return FiveSettings(
        full_zero_shot=perplexity(model, test),
        emulator_zero_shot=perplexity(emulated, test),
        ot_emulator=perplexity(plug_in(emulated, plan, state), test),
        ot_plug_in=perplexity(plug_in(model, plan, state), test),
        # Last, because it changes the model in place.
        full_fine_tuned=_full_fine_tuned(model, train, test, config.training),
    )


def _full_fine_tuned(
    model: Any, train: list[PackedSequence], test: list[PackedSequence], training: TrainingConfig
) -> float:
    torch.manual_seed(training.seed)
    model.requires_grad_(True)
    with Progress("full fine-tuning", training.steps) as bar:
        fit(model, train, training, report=lambda figures: bar.at(int(figures["step"]), loss=figures["loss"]))
    return perplexity(model, test)


if __name__ == "__main__":
    run_command("evaluate", EvaluateConfig, run, default_config=config_file("evaluate.yaml"))
