"""What a tuning run works on, and one such run: model and data in, an adapter's folder out.

Everything here is plain; whether it runs in this process or as a trial elsewhere is not its concern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from jobs.images.tuning import ImageWork, open_image_work
from jobs.limits import require_kind
from jobs.tuning.config import TuneConfig
from ot_ray.artifacts import BundleManifest, write_adapter
from ot_ray.data import PackedDataset, PackedSequence, load_sequences
from ot_ray.errors import ConfigError
from ot_ray.evaluation import loss_and_token_accuracy, mean_loss
from ot_ray.model import prepare_tuning, trainable_parameters
from ot_ray.model.loading import require_length, shape_in
from ot_ray.training import Checkpoints, TrainingConfig, TrainingResult, fit
from ot_ray.training.loop import Report
from ot_ray.training.text_source import files_of


@dataclass(frozen=True)
class Work:
    """A bundle's model and a customer's text, opened and tokenised. Images are an `ImageWork`."""

    model: PreTrainedModel
    """The emulated model; a run changes it."""
    bundle: BundleManifest
    """What it came from."""
    data: PackedDataset
    """The training data."""
    held_out: list[PackedSequence]
    """Validation data; may be empty."""
    accuracy: bool = False
    """Whether figures say of tokens how many are the likeliest, too."""

    @property
    def digest(self) -> str:
        """What identifies the training data."""
        return self.data.digest

    @property
    def evaluated(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.held_out)

    @property
    def rows(self) -> int:
        """Sequences that an epoch shows."""
        return len(self.data.sequences)

    @property
    def examples(self) -> int:
        """Documents in them."""
        return self.data.counts.documents - sum(self.data.counts.dropped.values())

    def evaluate(self, tuned: Any) -> dict[str, float]:
        """`validation_loss` in nats a token; `validation_token_accuracy` where accuracy is asked for."""
        if not self.accuracy:
            return {"validation_loss": mean_loss(tuned, self.held_out)}
        loss, right = loss_and_token_accuracy(tuned, self.held_out)
        return {"validation_loss": loss, "validation_token_accuracy": right}

    def fit(self, tuned: Any, training: TrainingConfig, **hooks: Any) -> TrainingResult:
        """Tune whatever has gradients. `hooks` as for `fit`."""
        return fit(tuned, self.data.sequences, training, accuracy=self.accuracy, **hooks)

    @property
    def figures(self) -> dict[str, Any]:
        """What went in, as JSON values."""
        counts = self.data.counts
        return {"documents": counts.documents, "dropped": counts.dropped, "tokens": counts.tokens}


def open_work(config: TuneConfig, cache: Path) -> Work | ImageWork:
    """Open the bundle, in `cache` where it is downloaded, and read the data.

    Raises:
        ConfigError: the bundle's owner does not take the method back, or its model takes images where there is text
            (or the reverse), or not so long sequences.
        DataError: the data cannot be read; names files, lines or images.
    """
    bundle = config.bundle.open(cache)
    if config.method not in bundle.manifest.methods:
        allowed = ", ".join(bundle.manifest.methods)
        raise ConfigError(f"method is {config.method!r}, which the bundle's owner does not take back; use {allowed}")
    require_kind(bundle.manifest.model_type, "data", images=config.images is not None)
    if config.images is not None:
        return open_image_work(bundle, config)
    assert config.data is not None
    require_length(config.sequence_length, shape_in(bundle.folder, str(bundle.folder)))
    tokenizer = bundle.load_tokenizer()
    data = load_sequences(config.data, tokenizer, config.sequence_length, files_of(config.data))
    held_out: list[PackedSequence] = []
    if (validation := config.validation) is not None:
        held_out = load_sequences(validation, tokenizer, config.sequence_length, files_of(validation)).sequences
    return Work(bundle.load_model(), bundle.manifest, data, held_out, accuracy=config.events is not None)


def tune_adapter(
    work: Work | ImageWork,
    config: TuneConfig,
    folder: Path,
    *,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
    hooks: Callable[[nn.Module], Mapping[str, Any]] = lambda tuned: {},
) -> dict[str, Any]:
    """Tune at `config.training.lr` and write the adapter into a new folder.

    Args:
        hooks: more of what `work.fit` takes, made of the model that is about to be tuned.

    Returns:
        `trainable_parameters`, `loss` of the last step (None if a checkpoint had all of them), and
        `validation_losses`, each with its step.
    """
    training = config.training
    torch.manual_seed(training.seed)
    tuned = prepare_tuning(work.model, work.bundle.plan, config.method, config.lora, config.bottleneck)
    evaluate = (lambda: work.evaluate(tuned)) if work.evaluated else None
    result = work.fit(tuned, training, evaluate=evaluate, checkpoints=checkpoints, report=report, **hooks(tuned))
    validation_loss = result.evaluations[-1]["validation_loss"] if result.evaluations else None
    save_tuned(folder, tuned, work, config, training.steps, validation_loss)
    return {
        "trainable_parameters": trainable_parameters(tuned),
        "loss": result.history[-1]["loss"] if result.history else None,
        "validation_losses": result.evaluations,
    }


def save_tuned(
    folder: Path, tuned: Any, work: Work | ImageWork, config: TuneConfig, step: int, validation_loss: float | None
) -> None:
    """Write the adapter as it is after a step into a new folder."""
    write_adapter(
        folder,
        tuned,
        work.bundle,
        method=config.method,
        steps=step,
        learning_rate=config.training.lr,
        validation_loss=validation_loss,
    )
