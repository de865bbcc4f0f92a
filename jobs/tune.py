"""Tune the adapter of a bundle on private data: on the customer's own machine, or as an isolated Ray job.

It reads a bundle and one data set, writes an adapter, and needs the base install only."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from jobs.command import config_file, run_command
from jobs.limits import require_empty, require_length
from ot_ray.artifacts import BundleSource, write_adapter
from ot_ray.config import Config
from ot_ray.data import DataConfig, load_sequences
from ot_ray.errors import ConfigError
from ot_ray.evaluation import mean_loss
from ot_ray.model import LoraSettings, Method, prepare_tuning, trainable_parameters
from ot_ray.model.loading import shape_in
from ot_ray.progress import Progress
from ot_ray.store import open_store, upload_folder
from ot_ray.training import Checkpoints, TrainingConfig, fit


class TuneConfig(Config):
    """A bundle, a customer's data, and how to tune."""

    bundle: BundleSource
    """What to tune."""
    data: DataConfig
    """The private training data."""
    validation: DataConfig | None = None
    """Private validation data: the emulated model's loss on it is reported, and goes with the adapter."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a sequence."""
    method: Method = "full"
    """What is trained inside the adapter layers."""
    lora: LoraSettings = LoraSettings()
    """For method `lora`."""
    training: TrainingConfig
    """The optimiser run."""
    output: str
    """Folder or `s3://` address of the adapter; must be empty."""
    checkpoints: str | None = None
    """Folder or address for checkpoints, from which a run that was stopped goes on."""


def run(config: TuneConfig) -> dict[str, Any]:
    """Tune the adapter of a bundle and write what was tuned."""
    require_empty("output", config.output)
    with tempfile.TemporaryDirectory() as temporary:
        bundle = config.bundle.open(Path(temporary) / "bundle")
        if config.method not in bundle.manifest.methods:
            allowed = ", ".join(bundle.manifest.methods)
            raise ConfigError(
                f"method is {config.method!r}, which the bundle's owner does not take back; use {allowed}"
            )
        require_length(config.sequence_length, shape_in(bundle.folder, str(bundle.folder)))
        tokenizer = bundle.load_tokenizer()
        data = load_sequences(config.data, tokenizer, config.sequence_length)
        held_out = (
            load_sequences(config.validation, tokenizer, config.sequence_length).sequences
            if config.validation is not None
            else []
        )
        torch.manual_seed(config.training.seed)
        tuned = prepare_tuning(bundle.load_model(), bundle.manifest.plan, config.method, config.lora)
        with Progress("tune", config.training.steps) as bar:
            result = fit(
                tuned,
                data.sequences,
                config.training,
                evaluate=(lambda: {"validation_loss": mean_loss(_plain(tuned), held_out)}) if held_out else None,
                checkpoints=_checkpoints(config, bundle.manifest.bundle_id, data.digest),
                report=lambda figures: bar.at(
                    int(figures["step"]), loss=figures["loss"], tokens_per_s=figures["tokens_per_s"]
                ),
            )
        folder = Path(temporary) / "adapter"
        validation_loss = result.evaluations[-1]["validation_loss"] if result.evaluations else None
        write_adapter(
            folder,
            tuned,
            bundle.manifest,
            method=config.method,
            steps=config.training.steps,
            learning_rate=config.training.lr,
            validation_loss=validation_loss,
        )
        upload_folder(open_store(config.output), folder, "", last="manifest.json")
    return {
        "adapter": config.output,
        "bundle_id": bundle.manifest.bundle_id,
        "method": config.method,
        "trainable_parameters": trainable_parameters(tuned),
        "documents": data.counts.documents,
        "dropped": data.counts.dropped,
        "tokens": data.counts.tokens,
        "loss": result.history[-1]["loss"] if result.history else None,
        "validation_losses": result.evaluations,
    }


def _plain(tuned: Any) -> Any:
    return tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned


def _checkpoints(config: TuneConfig, bundle_id: str, digest: str) -> Checkpoints | None:
    if config.checkpoints is None:
        return None
    same = config.model_dump(mode="json", include={"method", "lora", "training", "sequence_length"})
    return Checkpoints(
        open_store(config.checkpoints),
        "tune",
        {**same, "bundle_id": bundle_id, "data_digest": digest},
        keep=config.training.keep_checkpoints,
        patience_s=config.training.store_patience_s,
    )


if __name__ == "__main__":
    run_command("tune", TuneConfig, run, default_config=config_file("tune.yaml"))
