"""How many parameters each part of a distillation has, from the architecture alone.

What they weigh under a precision and a ZeRO stage is memory.py's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from ot_ray.model import SplitPlan, empty_model, family_of, uniform_layers


@dataclass(frozen=True)
class Parts:
    """Parameters of each part; tied tensors are counted once, in the embeddings."""

    embeddings: int
    """Everything before the first layer: tokens, positions, their norm."""
    bottom: int
    """A1."""
    middle: int
    """M, the teacher's own."""
    emulator: int
    """E, the only part that learns."""
    top: int
    """A2."""
    head: int
    """Everything after the last layer: the final norm, and the head where it is not tied."""
    largest: int
    """The largest single tensor."""
    output: int
    """The matrix from hidden states to logits, tied or not; counted above already."""
    layer_matrices: tuple[int, ...]
    """Entries of the matrices of each layer of the full model, in order; what a token is multiplied by."""

    @property
    def full(self) -> int:
        """The full model [A1 · M · A2]."""
        return self.embeddings + self.bottom + self.middle + self.top + self.head


def parts_of(shape: PretrainedConfig, split: SplitPlan) -> Parts:
    """Count the parts of a model without its weights.

    Raises:
        UnsupportedModelError: the architecture is not in the families' table.
        SplitError: the split does not fit it.
    """
    model = empty_model(shape, torch.bfloat16)
    family = family_of(model)
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    sizes = [_count(layer.parameters()) for layer in layers]
    middle = split.middle(len(layers))
    kept = [middle[i] for i in uniform_layers(len(middle), split.keep)]
    everything = dict(model.named_parameters())
    output = model.get_output_embeddings()
    assert isinstance(output, nn.Linear), "every family of the table has a linear head"
    inside = {id(parameter) for parameter in layers.parameters()}
    after = _after_the_layers(model, family.norm, inside)
    rest = _count(parameter for parameter in everything.values() if id(parameter) not in inside)
    return Parts(
        embeddings=rest - after,
        bottom=sum(sizes[: middle.start]),
        middle=sum(sizes[i] for i in middle),
        emulator=sum(sizes[i] for i in kept),
        top=sum(sizes[middle.stop :]),
        head=after,
        largest=max(parameter.numel() for parameter in everything.values()),
        output=output.weight.numel(),
        layer_matrices=tuple(_count(p for p in layer.parameters() if p.dim() > 1) for layer in layers),
    )


def _after_the_layers(model: nn.Module, norm: str, inside: set[int]) -> int:
    counted = {id(p): p for p in model.get_submodule(norm).parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    counted |= {id(p): p for p in head.parameters() if id(p) not in embeddings | inside}
    return _count(counted.values())


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
