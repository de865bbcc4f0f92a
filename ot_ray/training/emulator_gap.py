"""Perplexity of the full and of the emulated model, measured where they are trained: by all ranks together,
on a model that no rank holds whole. A model on one machine is evaluation's part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from ot_ray.data import PackedSequence, collate, rows_of
from ot_ray.errors import DataError
from ot_ray.training.engine import Engine

Setting = Literal["full", "emulated"]


def perplexity_over_ranks(engine: Engine, sequences: Sequence[PackedSequence], setting: Setting, rows: int) -> float:
    """Perplexity under one setting of the engine's `DistillModel`, every token that counts once.

    Every rank calls this together with the same sequences; each runs its share of them.

    Args:
        rows: sequences a pass.

    Raises:
        DataError: no token counts.
    """
    training = engine.module.training
    engine.module.eval()
    try:
        with torch.no_grad():
            parts = [_counted(engine, sequences, chosen, setting) for chosen in _passes(engine, len(sequences), rows)]
    finally:
        engine.module.train(training)
    # A mean over the ranks, on both sides of the fraction.
    summed = engine.mean({"nll": sum(nll for nll, _ in parts), "tokens": sum(tokens for _, tokens in parts)})
    if not summed["tokens"]:
        raise DataError("no token of the validation data counts; check its labels and length")
    return math.exp(summed["nll"] / summed["tokens"])


def _passes(engine: Engine, count: int, rows: int) -> list[range]:
    """This rank's sequences, pass by pass; as many passes on every rank, because sharded weights are gathered by
    all ranks together. An empty range is a pass that counts nothing."""
    shares = [_share(count, rank, engine.world_size) for rank in range(engine.world_size)]
    longest = max(len(share) for share in shares)
    own = shares[engine.rank]
    return [own[start : start + rows] for start in range(0, longest, rows)]


def _share(count: int, rank: int, world_size: int) -> range:
    return rows_of(count, rank, world_size) if count >= world_size else range(count)[rank : rank + 1]


def _counted(
    engine: Engine, sequences: Sequence[PackedSequence], chosen: range, setting: Setting
) -> tuple[float, float]:
    batch = collate([sequences[i] for i in chosen] or [sequences[0]])
    output = engine.module(**{name: tensor.to(engine.device) for name, tensor in batch.items()}, setting=setting)
    return (float(output["nll"]), float(output["tokens"])) if len(chosen) else (0.0, 0.0)
