"""Perplexity of a model on packed sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ot_ray.data import PackedSequence, collate
from ot_ray.errors import DataError
from ot_ray.model import isolated_documents


def mean_loss(model: PreTrainedModel, sequences: Sequence[PackedSequence], batch_size: int = 8) -> float:
    """Mean negative log-likelihood in nats over every token that counts, each once; documents kept apart.

    Args:
        model: put into evaluation mode for the time.
        batch_size: sequences a pass.

    Raises:
        DataError: no token counts.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), isolated_documents(model), _one_dtype(model):
            sums = [
                _summed_loss(model, sequences[start : start + batch_size])
                for start in range(0, len(sequences), batch_size)
            ]
    finally:
        model.train(training)
    count = sum(tokens for _, tokens in sums)
    if count == 0:
        raise DataError("no token of the evaluation data counts; check its labels and length")
    return sum(loss for loss, _ in sums) / count


def perplexity(model: PreTrainedModel, sequences: Sequence[PackedSequence], batch_size: int = 8) -> float:
    """`exp` of `mean_loss`."""
    return math.exp(mean_loss(model, sequences, batch_size))


def _summed_loss(model: PreTrainedModel, sequences: Sequence[PackedSequence]) -> tuple[float, int]:
    """Negative log-likelihood of the tokens that count, and how many they are."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(sequences).items()}
    output = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    targets = batch["labels"][:, 1:]
    wanted = targets != -100
    logits = output.logits[:, :-1][wanted].float()
    return F.cross_entropy(logits, targets[wanted], reduction="sum").item(), int(wanted.sum())


def _one_dtype(model: PreTrainedModel) -> torch.autocast:
    """Autocast for a model that is being tuned: float32 where it learns, bfloat16 where it is frozen."""
    mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=mixed)
