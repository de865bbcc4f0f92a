"""Fitting a language model or an image classifier on one machine with plain PyTorch, as tuning an adapter does.

What is trainable is decided in the model room; writing the adapter is artifacts' part."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from ot_ray.data import Batches, BatchStream, PackedSequence
from ot_ray.data.images import ImageBatches, LabelledImages
from ot_ray.model import ImageModel, LanguageModel
from ot_ray.model.language import compiled_layers
from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.config import TrainingConfig
from ot_ray.training.engine import TorchEngine
from ot_ray.training.loop import Evaluate, Report, TrainingResult, train


def fit(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[PackedSequence],
    config: TrainingConfig,
    *,
    evaluate: Evaluate | None = None,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
    milestones: Collection[int] = (),
    record: Report | None = None,
    accuracy: bool = False,
) -> TrainingResult:
    """Fit whatever has gradients in `model`, in place; it ends in evaluation mode on the CPU, in the types
    that it had.

    Args:
        milestones, record: as for `train`.
        accuracy: have `token_accuracy` among each step's figures.

    Raises:
        TrainingError: nothing has gradients, the batch does not divide, or the loss is not finite.
    """
    stream = BatchStream(sequences, config.batch_size, config.seed)
    hooks = Hooks(evaluate, checkpoints, report, milestones, record)
    return _fit(model, LanguageModel(model, accuracy), stream, config, hooks)


def fit_images(
    model: PreTrainedModel | PeftModel,
    images: LabelledImages,
    processor: BaseImageProcessor,
    config: TrainingConfig,
    *,
    workers: int = 0,
    evaluate: Evaluate | None = None,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
) -> TrainingResult:
    """Fit whatever has gradients in an image classifier, as `fit` does.

    Args:
        images: their labels count in the classes of the model's head.
        workers: threads that decode ahead.

    Raises:
        DataError: an image has no class, or does not open.
        TrainingError: nothing has gradients, the batch does not divide, or the loss is not finite.
    """
    images.require_classes()
    batches = ImageBatches(images, processor, config.batch_size, config.seed, workers)
    with contextlib.closing(batches):
        return _fit(model, ImageModel(model), batches, config, Hooks(evaluate, checkpoints, report))


@dataclass(frozen=True)
class Hooks:
    """What a run does between its steps, as `train` takes it."""

    evaluate: Evaluate | None
    checkpoints: Checkpoints | None
    report: Report | None
    milestones: Collection[int] = ()
    record: Report | None = None


def _fit(
    model: PreTrainedModel | PeftModel, module: nn.Module, batches: Batches, config: TrainingConfig, hooks: Hooks
) -> TrainingResult:
    dtypes = types_of(model)
    engine = TorchEngine(module, config)
    with compiled_layers(model, config.compile):
        result = train(
            engine,
            batches,
            config,
            checkpoints=hooks.checkpoints,
            report=hooks.report,
            evaluate=hooks.evaluate,
            milestones=hooks.milestones,
            record=hooks.record,
        )
    # The engine has put the inner model into evaluation mode, but PEFT's own wrapper not.
    model.eval().to(torch.device("cpu"))  # type: ignore[arg-type]
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    return result


def types_of(model: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """The type of each parameter, before a run makes float32 of those that learn."""
    return {parameter: parameter.dtype for parameter in model.parameters()}


@contextlib.contextmanager
def in_types(dtypes: Mapping[nn.Parameter, torch.dtype]) -> Iterator[None]:
    """Show the parameters that learn in the types they had, for a while in the middle of a run."""
    learning = {parameter: parameter.data for parameter in dtypes if parameter.requires_grad}
    for parameter, data in learning.items():
        parameter.data = data.to(dtypes[parameter])
    try:
        yield
    finally:
        for parameter, data in learning.items():
            parameter.data = data
