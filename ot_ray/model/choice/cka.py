"""The `cka` choice: adjacent layers whose outputs say the same form a cluster, and one of each stays.

After CRaSh (2023), without its sharing of weights between the layers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ot_ray.errors import TrainingError
from ot_ray.model.choice.passes import run_body
from ot_ray.model.families import first_of, layers_of
from ot_ray.model.split import SplitPlan, depth_of


def cka_layers(model: PreTrainedModel, plan: SplitPlan, batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Cluster the middle by the linear CKA of its layers' outputs; the centre of each cluster stays.

    Costs one forward pass over `batches`, up to 3M Gram matrices in float64, and M·N·D values in the model's type
    for the outputs of M layers on N tokens, in the machine's memory.

    Returns:
        As `choose_layers`.

    Raises:
        TrainingError: an output is not finite.
    """
    outputs = middle_outputs(model, plan, batches)
    device = next(model.parameters()).device

    @cache
    def product(i: int, j: int) -> float:
        return _squared_product(*(_centred(outputs[k].to(device)) for k in (i, j)))

    def similarity(i: int, j: int) -> float:
        return _normalized(product(i, j), product(i, i), product(j, j))

    return [(cluster[0] + cluster[-1]) // 2 for cluster in adjacent_clusters(len(outputs), plan.keep, similarity)]


def middle_outputs(model: PreTrainedModel, plan: SplitPlan, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """What each layer of the middle returns on the tokens that are not padding.

    Returns:
        For each layer [N, D], on the CPU, in the model's type.

    Raises:
        TrainingError: an output is not finite.
    """
    layers = [layers_of(model)[i] for i in plan.middle(depth_of(model))]
    rows: list[list[Tensor]] = [[] for _ in layers]
    for batch in batches:
        for parts, hidden_BTD in zip(rows, _layer_outputs(model, layers, batch), strict=True):
            real = batch.get("real")
            parts.append((hidden_BTD.flatten(0, 1) if real is None else hidden_BTD[real]).cpu())
    outputs = [torch.cat(parts) for parts in rows]
    for place, output in enumerate(outputs):
        if not output.isfinite().all():
            raise TrainingError(
                f"layer {place} of the middle returns values that are not finite on the calibration data, so that "
                "layers cannot be compared; use model.dtype=float32, or emulator.layers=uniform"
            )
    return outputs


def _layer_outputs(model: PreTrainedModel, layers: Sequence[nn.Module], batch: Mapping[str, Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(first_of(output))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.no_grad():
            run_body(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same N tokens, in float64.

    ``|YᵀX|² / (|XᵀX| |YᵀY|)`` with centred columns and Frobenius norms (Kornblith and others, 2019); by the products
    of features or of tokens, whichever matrices are smaller.

    Returns:
        From 0 to 1; 0 where one of the two is constant.
    """
    x, y = _centred(x_ND), _centred(y_NE)
    return _normalized(_squared_product(x, y), _squared_product(x, x), _squared_product(y, y))


def adjacent_clusters(count: int, keep: int, similarity: Callable[[int, int], float]) -> list[range]:
    """Merge neighbours among `count` layers until `keep` clusters are left.

    A cluster's output is that of its last layer. Of all neighbours those are merged whose outputs are the most
    similar, the first ones among equals, so that a cluster does not drift far from where it began.

    Args:
        similarity: of the outputs of two layers, by their places.
    """
    clusters = [range(i, i + 1) for i in range(count)]
    while len(clusters) > keep:
        likeness = [similarity(a[-1], b[-1]) for a, b in pairwise(clusters)]
        i = likeness.index(max(likeness))
        clusters[i : i + 2] = [range(clusters[i].start, clusters[i + 1].stop)]
    return clusters


def _centred(x_ND: Tensor) -> Tensor:
    x = x_ND.double()
    return x - x.mean(0)


def _squared_product(x_ND: Tensor, y_NE: Tensor) -> float:
    """``|YᵀX|²``, which is the sum of ``XXᵀ * YYᵀ``."""
    tokens = len(x_ND)
    if tokens * tokens < x_ND.shape[1] * y_NE.shape[1]:
        return ((x_ND @ x_ND.T) * (y_NE @ y_NE.T)).sum().item()
    return (y_NE.T @ x_ND).pow(2).sum().item()


def _normalized(cross: float, x: float, y: float) -> float:
    scale = (x * y) ** 0.5
    return cross / scale if scale > 0 else 0.0
