"""The table of choices, and the one function that makes them.

A choice sees the owner's public text only; putting the layers together is split.py's part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ot_ray.errors import DataError
from ot_ray.model.choice.cka import cka_layers
from ot_ray.model.choice.gradient import gradient_layers
from ot_ray.model.choice.passes import first_rows, undisturbed
from ot_ray.model.emulator import EmulatorConfig, uniform_layers
from ot_ray.model.split import SplitPlan, depth_of

Choice = Callable[[PreTrainedModel, SplitPlan, Sequence[Mapping[str, Tensor]]], list[int]]
"""From the full model, the split and calibration batches to the layers that stay."""


def _uniform(model: PreTrainedModel, plan: SplitPlan, batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
    return uniform_layers(len(plan.middle(depth_of(model))), plan.keep)


CHOICES: dict[str, Choice] = {"uniform": _uniform, "cka": cka_layers, "gradient": gradient_layers}
"""By the name that `emulator.layers` has."""


def choose_layers(
    model: PreTrainedModel, plan: SplitPlan, config: EmulatorConfig, batches: Iterable[Mapping[str, Tensor]]
) -> list[int]:
    """Choose the `plan.keep` layers of the middle that an emulator starts from, as `config.layers` says.

    Equal inputs give equal layers. The model is left as it was.

    Args:
        model: the full model, whole and on one device.
        batches: public text as `collate` makes it (or images); the first `config.calibration` rows count, and
            `uniform` looks at none.

    Returns:
        Places within the middle, ascending, counted from 0.

    Raises:
        SplitError: the plan does not fit the model.
        DataError: a choice that looks at text was given none.
        TrainingError: the model's outputs or gradients on it are not finite.
    """
    middle = plan.middle(depth_of(model))
    if plan.keep == len(middle) or config.layers == "uniform":
        return _uniform(model, plan, ())
    rows = list(first_rows(batches, config.calibration, next(model.parameters()).device))
    if not rows:
        raise DataError(f"emulator.layers is {config.layers!r}, which looks at public text, but there is none")
    with undisturbed(model):
        return CHOICES[config.layers](model, plan, rows)
