"""The `gradient` choice: keep the layers with which the adapter gets the gradient that the full model gives it.

In the spirit of GradOT (2025). How far apart two gradients are is measured here; search.py says which are tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ot_ray.errors import TrainingError
from ot_ray.model.choice.passes import loss_of, with_labels
from ot_ray.model.choice.search import best_kept
from ot_ray.model.families import layers_of
from ot_ray.model.split import SplitPlan, depth_of, emulate, freeze_all_but_adapter

_COORDINATES = 1 << 16
_DAMPING = 0.01


def gradient_layers(model: PreTrainedModel, plan: SplitPlan, batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Choose the layers whose emulated model gives A1 and A2 the gradient nearest to the full model's.

    A layer is gated, ``(1 - z) h + z layer(h)``: z = 0 drops it. First each layer is dropped alone, which says to
    first order what dropping several does; then the most promising sets are measured as they are, and the nearest
    one is taken, the uniform choice among them. See `AdapterGradients` for the distance, `best_kept` for the search.

    Costs up to 3M + 1 forward and backward passes over `batches`, for M layers in the middle; memory as for tuning
    without optimiser state, and M·n·65,536 float32 values for n batches.

    Returns:
        As `choose_layers`; never farther from the full model's gradient than the uniform choice.

    Raises:
        TrainingError: the full model's gradient is not finite, or nought.
    """
    gradients = AdapterGradients(model, plan, batches)
    return best_kept(gradients.size, plan.keep, gradients.difference)


class AdapterGradients:
    """Gradients of the tuning loss by the weights of A1 and A2, for any choice of layers between them.

    They are compared batch by batch in the norm of the inverse Fisher matrix, taken as diagonal: the mean square
    of the full model's own gradients, with a hundredth of its mean added. Of more than 65,536 weights as many
    are drawn, always the same, which estimates the distance between large adapters well because the Fisher
    matrix has made their weights alike.

    Args:
        model: the full model; gradients are switched on for its adapter and off elsewhere.
    """

    def __init__(self, model: PreTrainedModel, plan: SplitPlan, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._model, self._plan = model, plan
        self._batches = [with_labels(model, batch) for batch in batches]
        self.size = len(plan.middle(depth_of(model)))
        """Layers of the middle."""
        freeze_all_but_adapter(model, plan)
        positions = plan.adapter_positions(depth_of(model))
        self._weights = [weight for i in positions for weight in layers_of(model)[i].parameters()]
        self._drawn = _drawn([weight.numel() for weight in self._weights])
        full = self._gradients(range(self.size))
        fisher = full.pow(2).mean(0)
        if not fisher.isfinite().all() or not fisher.any():
            raise TrainingError(
                "the adapter's gradient on the calibration data is nought or not finite, so that layers cannot be "
                "compared by it; use model.dtype=float32, or emulator.layers=uniform"
            )
        self._scale = (fisher + _DAMPING * fisher.mean()).rsqrt()
        self._full = full * self._scale

    def difference(self, kept: Sequence[int]) -> Tensor:
        """What the gradient with only these layers of the middle has more than the full model's.

        Args:
            kept: places in the middle, ascending.

        Returns:
            float32 [V], whitened; the squared distance is the sum of squares.
        """
        return (self._gradients(kept) * self._scale - self._full).flatten()

    def distance(self, kept: Sequence[int]) -> float:
        """The squared distance from the full model's gradient, as a share of that gradient's own square."""
        return (self.difference(kept).pow(2).sum() / self._full.pow(2).sum()).item()

    def _gradients(self, kept: Sequence[int]) -> Tensor:
        """float32 [batches, coordinates]."""
        plan = self._plan.model_copy(update={"keep": len(kept)})
        # The emulated model shares its tensors with the full one, so that these are the adapter's own gradients.
        emulated = emulate(self._model, plan, list(kept), share=True)
        return torch.stack([self._gradient(emulated, batch) for batch in self._batches])

    def _gradient(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_of(model, batch), self._weights, materialize_grads=True)
        return torch.cat(
            [
                (gradient.flatten() if places is None else gradient.flatten()[places.to(gradient.device)]).float()
                for gradient, places in zip(gradients, self._drawn, strict=True)
            ]
        )


def _drawn(sizes: Sequence[int]) -> list[Tensor | None]:
    """Which weights of each tensor are looked at; None where all are."""
    total = sum(sizes)
    if total <= _COORDINATES:
        return [None] * len(sizes)
    generator = torch.Generator().manual_seed(0)
    counts = [max(1, round(size * _COORDINATES / total)) for size in sizes]
    return [torch.randint(size, (count,), generator=generator) for size, count in zip(sizes, counts, strict=True)]
