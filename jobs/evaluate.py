"""The five settings of offsite tuning: perplexities on one test split, and scores on tasks of the
lm-evaluation-harness, each as a table and files."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from jobs.command import config_file, run_command
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.scores import score_settings
from jobs.images.evaluation import measure_images
from jobs.limits import require_folder, require_kind, require_same_model
from ot_ray.artifacts import (
    InspectedAdapter,
    ModelSource,
    inspect_adapter,
    load_full,
    open_model_source,
    plain_state,
)
from ot_ray.data import PackedSequence, load_sequences
from ot_ray.evaluation import FiveSettings, perplexity
from ot_ray.model import SplitPlan, adapter_state, plug_in
from ot_ray.model.loading import require_length
from ot_ray.progress import Progress
from ot_ray.store import download_folder, open_store
from ot_ray.training import TrainingConfig, fit
from ot_ray.training.text_source import files_of

__all__ = ["EvaluateConfig", "measure", "run"]


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Report the five settings: perplexity on the test split, and scores on tasks.

    Scores are kept by what decides them, so that the same inputs compute nothing the second time.
    """
    require_folder("output", config.output)
    found: dict[str, Any] = {}
    # Before the tasks, whose scores may take hours.
    text = open_text(config) if config.test is not None else None
    if config.harness is not None:
        found |= _score_tasks(config)
    if config.test_images is not None:
        found |= _reported(measure_images(config), config, config.test_images.name)
    if text is not None and config.test is not None:
        found |= _reported(_measured(text, config), config, config.test.name)
    return found


def _reported(report: FiveSettings, config: EvaluateConfig, data: str) -> dict[str, Any]:
    # First, so that the figures are seen whatever happens to the files.
    print(report.table(), flush=True)
    title = f"{config.model.name}: offsite tuning, five settings"
    files = report.write(config.output, title, {"model": config.model.name, "data": data})
    return {"measure": report.measure.name, **report.as_dict(), **files}


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


@dataclass(frozen=True)
class Text:
    """What the perplexities are computed of, opened and inspected."""

    source: ModelSource
    train: list[PackedSequence]
    test: list[PackedSequence]
    emulated: PreTrainedModel
    plan: SplitPlan
    adapter: InspectedAdapter


def open_text(config: EvaluateConfig) -> Text:
    """Open and check all that `measure` needs, but for the full model.

    Raises:
        OTRayError: something is not there, not sound, or does not fit the rest.
    """
    assert config.bundle and config.adapter and config.train and config.test
    source = open_model_source(config.model)
    require_kind(source.config.model_type, "test", images=False)
    require_length(config.sequence_length, source.config)
    with tempfile.TemporaryDirectory() as temporary:
        bundle = config.bundle.open(Path(temporary) / "bundle")
        require_same_model(bundle.manifest.model, config.model.name)
        folder = Path(temporary) / "adapter"
        download_folder(open_store(config.adapter), "", folder)
        adapter = inspect_adapter(folder, bundle.manifest)
        emulated = bundle.load_model()
    tokenizer = source.tokenizer()
    test, train = (
        load_sequences(data, tokenizer, config.sequence_length, files_of(data)).sequences
        for data in (config.test, config.train)
    )
    return Text(source, train, test, emulated, bundle.manifest.plan, adapter)


def measure(config: EvaluateConfig) -> FiveSettings:
    """Compute the five perplexities; full fine-tuning is trained here, for reference."""
    return _measured(open_text(config), config)


def _measured(text: Text, config: EvaluateConfig) -> FiveSettings:
    model = load_full(config.model, source=text.source)
    emulated, plan, test = text.emulated, text.plan, text.test
    state = plain_state(text.adapter, adapter_state(model, plan))
    return FiveSettings(
        full_zero_shot=perplexity(model, test),
        emulator_zero_shot=perplexity(emulated, test),
        ot_emulator=perplexity(plug_in(emulated, plan, state), test),
        ot_plug_in=perplexity(plug_in(model, plan, state), test),
        # Last, because it changes the model in place.
        full_fine_tuned=_full_fine_tuned(model, text.train, test, config.training),
        method=text.adapter.manifest.method,
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
