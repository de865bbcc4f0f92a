"""Houlsby's bottleneck: a small map with a residual, behind the last linear maps of a layer's attention and MLP.

Which layers get one is decided by the caller; training them is in tuning, returning them in artifacts."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.nn.functional import gelu
from torch.nn.utils import skip_init
from transformers import PreTrainedModel

from ot_ray.errors import SplitError
from ot_ray.model.families import Family, check_maps_are_called, family_of

CHILD = "bottleneck"
"""The name of the module, as a child of the linear map whose output it changes."""


class Bottleneck(nn.Module):
    """``y + up(gelu(down(y)))`` (Houlsby et al. 2019, figure 2), of the linear map that it is a child of.

    Letters: D width of the map's output, S size of the bottleneck. `down` holds [S, D] and [S], `up` [D, S] and [D].
    Values are whatever memory holds until `start`, or until they are put in.
    """

    def __init__(self, width: int, size: int, like: torch.Tensor) -> None:
        super().__init__()
        # No draw: a plug-in model is filled from a file, and must not move the caller's random numbers.
        self.down: nn.Linear = _unfilled(width, size, like)
        self.up: nn.Linear = _unfilled(size, width, like)

    def start(self) -> None:
        """Draw `down`, and set `up` to 0, so that the output is that of the linear map alone."""
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """Takes and returns [..., D], in the type that came in; the bottleneck itself may be of another."""
        update = self.up(gelu(self.down(output.to(self.down.weight.dtype))))
        return output + update.to(output.dtype)


def _unfilled(inputs: int, outputs: int, like: torch.Tensor) -> nn.Linear:
    return skip_init(nn.Linear, inputs, outputs, device=like.device, dtype=like.dtype)  # type: ignore[return-value]


def bottleneck_places(family: Family) -> tuple[str, str]:
    """Inside a layer, the linear maps that get a bottleneck."""
    return family.attention_out, family.mlp_out


def bottleneck_shapes(width: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, as a child of its linear map, and shape of each tensor of a bottleneck."""
    yield f"{CHILD}.down.weight", (size, width)
    yield f"{CHILD}.down.bias", (size,)
    yield f"{CHILD}.up.weight", (width, size)
    yield f"{CHILD}.up.bias", (width,)


def output_width(family: Family, shape: Collection[int]) -> int:
    """Width of what a linear map gives, by the shape of its weight."""
    rows, columns = shape
    return columns if family.transposed else rows


def insert_bottleneck(model: PreTrainedModel, layer: nn.Module, place: str, size: int) -> Bottleneck:
    """Put a bottleneck of any values behind a linear map of a layer of `model`; it is of that map's type and device.

    Raises:
        SplitError: there is one already.
        UnsupportedModelError: the architecture is set up to pass by its linear maps.
    """
    check_maps_are_called(model.config)
    linear = layer.get_submodule(place)
    if hasattr(linear, CHILD):
        raise SplitError(
            f"{place} of an adapter layer has a bottleneck already, and a second one would not be returned; open the "
            "model anew, or go on training the one that is there"
        )
    weight = linear.get_parameter("weight")
    bottleneck = Bottleneck(output_width(family_of(model), weight.shape), size, weight)
    linear.add_module(CHILD, bottleneck)
    # A plain function, so that copies of the model run their own bottlenecks.
    linear.register_forward_hook(_through_bottleneck)
    return bottleneck.train(linear.training)


def _through_bottleneck(linear: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return linear.get_submodule(CHILD)(output)
