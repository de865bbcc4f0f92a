"""Which layers of the middle an emulator keeps, and putting distilled weights into them.

Distilling is in distill.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.errors import SplitError
from ot_ray.model.families import layers_of
from ot_ray.model.split import SplitPlan


class EmulatorConfig(Config):
    """What becomes of the middle: layers dropped, then maps factored, weights pruned, then quantized.

    `split.keep` says how many layers stay. The rest is of Figure 4 of the Offsite-Tuning paper, and alone or together.
    """

    layers: Literal["uniform", "cka", "gradient"] = "uniform"
    """Which layers of the middle are kept."""
    sparsity: float = Field(default=0.0, ge=0, lt=1)
    """Share of each linear map's weights that is pruned, the smallest in magnitude first."""
    bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of a linear map's weight; unset, weights are not quantized."""
    group_size: int = Field(default=64, ge=8)
    """Weights along a linear map's input that share a scale, where they are quantized."""
    attention_rank: float | None = Field(default=None, gt=0, le=1)
    """Rank of the attention's maps as a share of their full rank; unset, they are not factored. Maps whose factors
    would be larger (square ones, from half the rank on) stay whole."""
    mlp_channels: float | None = Field(default=None, gt=0, le=1)
    """Share of the MLP's channels that stay; unset, all."""
    calibration: int = Field(default=64, ge=1)
    """Public sequences that `cka`, `gradient` and the factored maps look at."""

    @property
    def packed(self) -> bool:
        """Whether linear maps are stored pruned or quantized."""
        return self.sparsity > 0 or self.bits is not None

    @property
    def factored(self) -> bool:
        """Whether layers get smaller maps, which start from what the calibration data shows."""
        return self.attention_rank is not None or self.mlp_channels is not None

    @property
    def compressed(self) -> bool:
        """Whether layers have other linear maps than the model's own."""
        return self.packed or self.factored


def uniform_layers(middle: int, keep: int) -> list[int]:
    """Choose `keep` of `middle` layers at even distances, the first and the last always among them.

    Uniform layer drop of the Offsite-Tuning paper (section 3.3): ``round(i (M - 1) / (k - 1))`` for
    i = 0..k-1. A single layer is taken from the centre.

    Returns:
        Positions within the middle, ascending, counted from 0.

    Raises:
        SplitError: `keep` is not in 1..`middle`.
    """
    if not 1 <= keep <= middle:
        raise SplitError(f"split.keep is {keep}, but only {middle} layers lie between the adapters; use 1..{middle}")
    if keep == 1:
        return [(middle - 1) // 2]
    return [round(i * (middle - 1) / (keep - 1)) for i in range(keep)]


def load_emulator(model: PreTrainedModel, plan: SplitPlan, state: Mapping[str, torch.Tensor]) -> None:
    """Put distilled weights into the emulator layers of an emulated model, in place.

    Args:
        state: tensors named ``<layer of E>.<name>``, as `DistillModel.emulator_state` names them.

    Raises:
        SplitError: a tensor is missing, unknown or of another shape.
    """
    layers = layers_of(model)
    ours = {
        f"{place}.{name}": parameter
        for place in range(plan.keep)
        for name, parameter in layers[plan.bottom + place].named_parameters()
    }
    copy_state(ours, state, f"the emulator's weights do not fit split {plan}")


def copy_state(
    parameters: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    refusal: str,
    start: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
) -> None:
    """Copy tensors into the parameters of their names, in place, if that is all of them and nothing else.

    Args:
        refusal: how the error begins.
        start: what is copied, given a name and its tensor.

    Raises:
        SplitError: a tensor is missing, unknown or of another shape; nothing was copied.
    """
    wrong = sorted(parameters.keys() ^ state.keys())
    wrong += sorted(n for n in parameters.keys() & state.keys() if parameters[n].shape != state[n].shape)
    if wrong:
        raise SplitError(f"{refusal}: {', '.join(wrong[:5])} missing, unknown or misshaped")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start(name, state[name]))
