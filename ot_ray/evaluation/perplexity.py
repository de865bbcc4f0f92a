"""Perplexity of a model on packed sequences, without ever holding whole logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ot_ray.data import PackedSequence, collate, without_padding
from ot_ray.errors import DataError
from ot_ray.model import LanguageModel
from ot_ray.model.distill import body_output
from ot_ray.model.losses import IGNORED


def mean_loss(model: PreTrainedModel | PeftModel, sequences: Sequence[PackedSequence], batch_size: int = 8) -> float:
    """Mean negative log-likelihood in nats over every token that counts, each once; documents kept apart.

    Args:
        model: put into evaluation mode for the time.
        batch_size: sequences a pass.

    Raises:
        DataError: no token counts.
    """
    return _means(model, sequences, batch_size, accuracy=False)[0]


def loss_and_token_accuracy(
    model: PreTrainedModel | PeftModel, sequences: Sequence[PackedSequence], batch_size: int = 8
) -> tuple[float, float]:
    """`mean_loss`, and the share of the same tokens that the model finds likeliest in their places.

    Raises:
        DataError: no token counts.
    """
    return _means(model, sequences, batch_size, accuracy=True)


def _means(
    model: PreTrainedModel | PeftModel, sequences: Sequence[PackedSequence], batch_size: int, accuracy: bool
) -> tuple[float, float]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _one_dtype(model):
            language = LanguageModel(model)
            sums = [
                _sums(language, sequences[start : start + batch_size], accuracy)
                for start in range(0, len(sequences), batch_size)
            ]
    finally:
        model.train(training)
    loss, right, count = (sum(part) for part in zip(*sums, strict=True)) if sums else (0.0, 0.0, 0)
    if count == 0:
        raise DataError("no token of the evaluation data counts; check its labels and length")
    return loss / count, right / count


def perplexity(model: PreTrainedModel | PeftModel, sequences: Sequence[PackedSequence], batch_size: int = 8) -> float:
    """`exp` of `mean_loss`."""
    return math.exp(mean_loss(model, sequences, batch_size))


def _sums(model: LanguageModel, sequences: Sequence[PackedSequence], accuracy: bool) -> tuple[float, float, int]:
    """Negative log-likelihood of the tokens that count, how many of them are the likeliest, and how many they are."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in without_padding(collate(sequences)).items()}
    hidden = body_output(model.model, batch["input_ids"], batch["position_ids"])
    found = model.head(hidden, batch["labels"], summed=True, accuracy=accuracy)
    loss, right = (found[0].item(), found[1].item()) if accuracy else (found.item(), 0.0)
    return loss, right, int((batch["labels"][:, 1:] != IGNORED).sum())


def _one_dtype(model: torch.nn.Module) -> torch.autocast:
    """Autocast for a model that is being tuned: float32 where it learns, bfloat16 where it is frozen."""
    mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=mixed)
