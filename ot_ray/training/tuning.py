"""Fitting a language model on one machine with plain PyTorch, as tuning an adapter does.

What is trainable is decided in the model room; writing the adapter is artifacts' part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ot_ray.data import BatchStream, PackedSequence
from ot_ray.model import LanguageModel
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
) -> TrainingResult:
    """Fit whatever has gradients in `model`, in place; it ends in evaluation mode on the CPU, in the types
    that it had.

    Raises:
        TrainingError: nothing has gradients, the batch does not divide, or the loss is not finite.
    """
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    engine = TorchEngine(LanguageModel(model), config)
    stream = BatchStream(sequences, config.batch_size, config.seed)
    result = train(engine, stream, config, checkpoints=checkpoints, report=report, evaluate=evaluate)
    # The engine has put the inner model into evaluation mode, but PEFT's own wrapper not.
    model.eval().to(torch.device("cpu"))  # type: ignore[arg-type]
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    return result
