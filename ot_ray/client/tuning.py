"""`tune`: a bundle and a customer's text in, an adapter's folder out, on this machine.

Searches, images and checkpoints are what `python -m jobs.tune` has beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ot_ray.artifacts import AdapterManifest, Bundle, open_bundle, write_adapter
from ot_ray.data import DataConfig, load_sequences
from ot_ray.errors import ConfigError
from ot_ray.evaluation import mean_loss
from ot_ray.model import BottleneckSettings, LoraSettings, Method, prepare_tuning
from ot_ray.progress import Progress
from ot_ray.training import TrainingConfig, fit
from ot_ray.training.text_source import files_of


@dataclass(frozen=True)
class TunedAdapter:
    """What was tuned, ready to be sent."""

    folder: Path
    manifest: AdapterManifest


def tune(
    bundle: Bundle | str | Path,
    *,
    data: DataConfig | str | Path,
    validation: DataConfig | str | Path | None = None,
    output: str | Path | None = None,
    method: Method | None = None,
    training: TrainingConfig | None = None,
    sequence_length: int = 512,
    lora: LoraSettings | None = None,
    bottleneck: BottleneckSettings | None = None,
) -> TunedAdapter:
    """Tune the adapter of a bundle on private text.

    Args:
        bundle: what `Client.download` gave, or its folder.
        data: the training text: a file, or what `jobs.tune` takes as `data`.
        validation: held-out text; its loss goes with the adapter.
        output: the adapter's folder, not yet there; unset, the bundle's with `-adapter` behind.
        method: unset, `lora` where the owner takes it back, else the first that the owner does.
        training: unset, 300 steps of 8 sequences at the owner's recommended `learning_rate`, or 1e-4.
        sequence_length: tokens of a sequence.

    Raises:
        ConfigError: the owner does not take the method back.
        DataError: the data cannot be read; names files and lines.
        AlreadyExistsError: `output` is there and not empty.
    """
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    manifest = bundle.manifest
    if method is None:
        method = "lora" if "lora" in manifest.methods else manifest.methods[0]
    if method not in manifest.methods:
        raise ConfigError(
            f"method is {method!r}, which the owner does not take back; use {', '.join(manifest.methods)}"
        )
    training = training or _training(manifest.recommended)
    tokenizer = bundle.load_tokenizer()

    def sequences(source: DataConfig | str | Path) -> Any:
        config = source if isinstance(source, DataConfig) else DataConfig(source=str(source))
        return load_sequences(config, tokenizer, sequence_length, files_of(config)).sequences

    learnt, held_out = sequences(data), sequences(validation) if validation is not None else None
    torch.manual_seed(training.seed)
    tuned = prepare_tuning(
        bundle.load_model(), manifest.plan, method, lora or LoraSettings(), bottleneck or BottleneckSettings()
    )
    with Progress("tune", training.steps) as bar:
        fit(tuned, learnt, training, report=lambda figures: bar.at(int(figures["step"]), loss=figures["loss"]))
    folder = Path(output) if output is not None else bundle.folder.with_name(f"{bundle.folder.name}-adapter")
    written = write_adapter(
        folder,
        tuned,
        manifest,
        method=method,
        steps=training.steps,
        learning_rate=training.lr,
        validation_loss=mean_loss(tuned, held_out) if held_out is not None else None,
    )
    return TunedAdapter(folder, written)


def _training(recommended: dict[str, Any]) -> TrainingConfig:
    rate = recommended.get("learning_rate", 1e-4)
    return TrainingConfig(steps=300, batch_size=8, lr=float(rate), warmup_steps=20)
