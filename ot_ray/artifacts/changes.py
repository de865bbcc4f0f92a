"""How far a returned adapter moves from the original, tensor by tensor, and which moves no tuning makes.

It works on merged tensors, so that all methods are measured alike. Files are left to inspection.py, and whether
the tuned model is a good one to the canary and to evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch.nn.functional import gelu

from ot_ray.artifacts.manifest import BundleManifest
from ot_ray.config import Config
from ot_ray.errors import AdapterRejectedError
from ot_ray.model import FAMILIES
from ot_ray.model.bottleneck import CHILD
from ot_ray.model.head import is_head

_ROUNDS = 12  # of power iteration; a spike stands out after two or three
_MOST_REASONS = 20


class ChangeLimits(Config):
    """How far each tensor may move.

    The defaults are far from what tuning does and near what breaks a model: the four methods at their usual rates and
    at up to ten times those (full 5e-3, LoRA 4e-3, bottleneck 8e-3, BitFit 5e-3), 40 to 200 steps on a trained model of
    10 layers, move a tensor by at most 0.66 of its norm, an entry by 5.0 and a direction by 1.7.
    """

    max_relative_norm: float = Field(default=8.0, gt=0)
    """Norm of the change over the original tensor's (Frobenius)."""
    max_relative_entry: float = Field(default=60.0, gt=0)
    """Largest entry of the change over the root mean square of the original tensor's."""
    max_relative_direction: float = Field(default=8.0, gt=0)
    """Of a matrix whose change has more than `max_direction_share` of its energy in one direction: the change's largest
    singular value over the original's."""
    max_direction_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the change's squared norm in its first singular direction. Alone it refuses nothing: LoRA of rank 1 has
    a share of 1, and tuning at 2e-3 one of 0.9."""


@dataclass(frozen=True)
class Change:
    """How one tensor moved; each figure is relative to the original tensor."""

    name: str
    norm: float
    entry: float
    direction: float
    """Largest singular value over the original's; 0 for vectors."""
    share: float
    """Of the squared norm, in the first singular direction; 0 for vectors."""


def measure_changes(
    bundle: BundleManifest, state: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor]
) -> list[Change]:
    """Measure a tuned adapter against the untuned one.

    A vector that starts near 0, as a bias does, is measured by what it is added to: the root mean square of the
    outputs of its linear map for inputs of unit variance, or of its norm's weights. A bottleneck is measured by the map
    it is equal to where its activation lets everything pass: up · down · W beside W, and its bias at input 0.

    Args:
        state: the merged tensors, as `plain_state` gives them; heads are left out, for they are made anew.
        original: the untuned adapter under the same names.

    Returns:
        One measurement a tensor of `original`, and one more a bottleneck; those that did not move are left out.
    """
    transposed = FAMILIES[bundle.model_type].transposed
    floor = _typical(original)
    found = []
    for name, change in _moves(state, original, transposed):
        reference = original.get(name.replace(f".{CHILD}.", "."))
        rms = _rms(reference) if change.dim() > 1 else max(_rms(reference), _beside(name, original, transposed))
        found.append(_measured(name, change, reference, rms or floor))
    return [change for change in found if change.entry > 0]


def require_sane_changes(
    bundle: BundleManifest,
    state: Mapping[str, torch.Tensor],
    original: Mapping[str, torch.Tensor],
    limits: ChangeLimits | None = None,
) -> dict[str, float]:
    """Refuse an adapter that moved nothing, or a tensor further than tuning moves it.

    Returns:
        The largest of each figure, for the plug-in's report.

    Raises:
        AdapterRejectedError: lists every tensor that moved too far, or says that none moved.
    """
    limits = limits or ChangeLimits()
    changes = measure_changes(bundle, state, original)
    if not changes and not any(is_head(name) for name in state):
        raise rejected(["it is unchanged, tensor for tensor that of the bundle; send what was tuned"])
    reasons = [reason for change in changes for reason in _excesses(change, limits)]
    if reasons:
        more = [f"and {len(reasons) - _MOST_REASONS} more of this kind"] if len(reasons) > _MOST_REASONS else []
        raise rejected(reasons[:_MOST_REASONS] + more)
    return {
        "change_norm": max((change.norm for change in changes), default=0.0),
        "change_entry": max((change.entry for change in changes), default=0.0),
        "change_direction": max((change.direction for change in changes), default=0.0),
    }


def rejected(reasons: Sequence[str]) -> AdapterRejectedError:
    """The error that lists these reasons."""
    return AdapterRejectedError("the adapter is rejected: " + "; ".join(reasons), reasons)


def _excesses(change: Change, limits: ChangeLimits) -> Iterator[str]:
    tip = "tune at a lower learning rate"
    # Written so that a figure that is not a number is an excess too.
    if not change.norm <= limits.max_relative_norm:
        yield (
            f"tensor {change.name} moved by {change.norm:.3g} times the original's norm; at most "
            f"{limits.max_relative_norm:g} is taken: {tip}"
        )
    if not change.entry <= limits.max_relative_entry:
        yield (
            f"an entry of tensor {change.name} moved by {change.entry:.3g} times the original's root mean square; at "
            f"most {limits.max_relative_entry:g} is taken: {tip}"
        )
    if change.share > limits.max_direction_share and not change.direction <= limits.max_relative_direction:
        yield (
            f"tensor {change.name} moved along one direction, which holds {change.share:.0%} of the change, by "
            f"{change.direction:.3g} times the original's largest singular value; at most "
            f"{limits.max_relative_direction:g} is taken: {tip}"
        )


def _moves(
    state: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], transposed: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The change of each tensor in float32, by its name; those of bottlenecks under names of their own."""
    for name, tensor in original.items():
        if not is_head(name):
            yield name, state[name].float() - tensor.to(state[name].device).float()
    for name in state:
        host, inside, rest = name.partition(f".{CHILD}.")
        if inside and rest == "down.weight":
            yield from _bottleneck_moves(host, state, transposed)


def _bottleneck_moves(
    host: str, state: Mapping[str, torch.Tensor], transposed: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    part = {end: state[f"{host}.{CHILD}.{end}"].float() for end in ("down.weight", "down.bias", "up.weight", "up.bias")}
    weight = state[f"{host}.weight"].float()
    inner = part["down.weight"] @ (weight.T if transposed else weight)
    change = part["up.weight"] @ inner
    yield f"{host}.{CHILD}.weight", change.T if transposed else change
    yield f"{host}.{CHILD}.bias", part["up.weight"] @ gelu(part["down.bias"]) + part["up.bias"]


def _measured(name: str, change: torch.Tensor, reference: torch.Tensor | None, rms: float) -> Change:
    size = float(change.norm())
    norm, entry = size / (rms * math.sqrt(change.numel())), float(change.abs().max()) / rms
    if change.dim() != 2 or size == 0 or reference is None:
        return Change(name, norm, entry, 0.0, 0.0)
    largest = _largest_singular_value(change)
    own = _largest_singular_value(reference.float()) or rms * math.sqrt(max(change.shape))
    return Change(name, norm, entry, largest / own, min(1.0, (largest / size) ** 2))


def _largest_singular_value(matrix: torch.Tensor) -> float:
    """By power iteration from a fixed start; a lower bound, and close where one direction stands out."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator).to(matrix.device)
    value = 0.0
    for _ in range(_ROUNDS):
        vector = vector / vector.norm().clamp_min(torch.finfo(torch.float32).tiny)
        image = matrix @ vector
        value = float(image.norm())
        vector = matrix.T @ image
    return value


def _beside(name: str, original: Mapping[str, torch.Tensor], transposed: bool) -> float:
    """What a vector is added to, of its module's weight: the size of one output for inputs of unit variance."""
    module = name.removesuffix(".bias").removesuffix(f".{CHILD}")
    weight = original.get(f"{module}.weight") if name.endswith(".bias") else None
    if weight is None:
        return 0.0
    if weight.dim() < 2:
        return _rms(weight)
    return _rms(weight) * math.sqrt(weight.shape[0 if transposed else 1])


def _typical(original: Mapping[str, torch.Tensor]) -> float:
    """The root mean square over all matrices, for tensors that are 0 altogether; 1 where everything is."""
    matrices = [tensor for name, tensor in original.items() if tensor.dim() > 1 and not is_head(name)]
    entries = sum(tensor.numel() for tensor in matrices)
    energy = sum(float(tensor.float().square().sum()) for tensor in matrices)
    return math.sqrt(energy / entries) if energy else 1.0


def _rms(tensor: torch.Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.float().square().mean().sqrt())
