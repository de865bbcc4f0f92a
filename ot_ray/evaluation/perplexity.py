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
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode(), isolated_documents(model):
        for start in range(0, len(sequences), batch_size):
            batch = {name: tensor.to(device) for name, tensor in collate(sequences[start : start + batch_size]).items()}
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[
                :, :-1
            ]
            targets = batch["labels"][:, 1:]
            wanted = targets != -100
            total += F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum").item()
            count += int(wanted.sum())
    model.train(training)
    if count == 0:
        raise DataError("no token of the evaluation data counts; check its labels and length")
    return total / count


def perplexity(model: PreTrainedModel, sequences: Sequence[PackedSequence], batch_size: int = 8) -> float:
    """`exp` of `mean_loss`."""
    return math.exp(mean_loss(model, sequences, batch_size))
