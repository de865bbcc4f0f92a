"""The five settings of offsite tuning on one test split: a table, a JSON file and a chart."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from jobs.command import config_file, run_command
from jobs.limits import require_folder, require_length
from ot_ray.artifacts import BundleSource, inspect_adapter, load_full, open_model_source, plain_state
from ot_ray.config import Config
from ot_ray.data import DataConfig, PackedSequence, load_sequences
from ot_ray.evaluation import FiveSettings, perplexity
from ot_ray.model import ModelConfig, adapter_state, plug_in
from ot_ray.progress import Progress
from ot_ray.store import download_folder, open_store
from ot_ray.training import TrainingConfig, fit


class EvaluateConfig(Config):
    """A model, its bundle, a tuned adapter, and the text on which all five settings are compared."""

    model: ModelConfig
    """The full model."""
    bundle: BundleSource
    """The bundle that was tuned."""
    adapter: str
    """Folder or address of the tuned adapter."""
    train: DataConfig
    """What the adapter was tuned on: the reference, full fine-tuning, is trained on the same."""
    test: DataConfig
    """The test split."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a sequence."""
    training: TrainingConfig
    """The optimiser run of full fine-tuning; for a fair comparison, the adapter's own."""
    output: str
    """Folder for `five_settings.json` and `five_settings.png`."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Report perplexity of the five settings on the test split."""
    require_folder("output", config.output)
    report = measure(config)
    # First, so that the figures are seen whatever happens to the files.
    print(report.table(), flush=True)
    files = report.write(config.output, f"{config.model.name}: offsite tuning, five settings")
    return {**report.as_dict(), **files}


def measure(config: EvaluateConfig) -> FiveSettings:
    """Compute the five perplexities; full fine-tuning is trained here, for reference."""
    source = open_model_source(config.model)
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
