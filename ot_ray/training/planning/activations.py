"""What the activations of one micro-batch weigh: the real pass of teacher and student, run without data.

Weights, gradients and optimiser state are memory.py's."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from ot_ray.model import DistillLoss, DistillModel, DistillOptions, SplitPlan, empty_model, uniform_layers
from ot_ray.training.planning.live_bytes import LiveBytes
from ot_ray.training.planning.shapes_only import ShapesOnly


class Activations(NamedTuple):
    """Most bytes that live at once in a pass of one micro-batch, beyond the weights."""

    forward: int
    """In the forward pass."""
    backward: int
    """In the backward pass, without the gradients of what learns."""
    backward_with_gradients: int
    """In a backward pass that starts without any gradients, with those that are there by then."""


def activations_of(
    shape: PretrainedConfig, split: SplitPlan, rows: int, length: int, dtype: torch.dtype, checkpointing: bool
) -> Activations:
    """Trace a micro-batch of two packed documents a row, without `torch.compile`.

    Args:
        rows: sequences of the micro-batch.
        length: tokens of a sequence.
        dtype: of matrix products and of the working copy of every weight.
        checkpointing: whether activations of E and A2 are computed again in the backward pass.
    """
    kept = uniform_layers(len(split.middle(shape.num_hidden_layers)), split.keep)
    options = DistillOptions(checkpointing=checkpointing)
    module = DistillModel(empty_model(_fused(shape), dtype), split, kept, DistillLoss(), options).train()
    shapes, alone, together = ShapesOnly(), LiveBytes(), LiveBytes()
    _drop_data(module, shapes)
    batch = packed_rows(rows, length)
    for live in (alone, together):
        live.leave_out(*module.parameters(), *module.buffers(), *batch.values())
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda learnt: alone.leave_out(learnt.grad))  # type: ignore[arg-type]
    with shapes, alone, together:
        loss = module(**batch)["loss"]
        forward = alone.peak
        alone.restart()
        together.restart()
        loss.backward()
    return Activations(forward, alone.peak, together.peak)


def packed_rows(rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of two documents a row, so that what keeps them apart is counted as well."""
    positions = torch.arange(length)
    positions[length // 2 :] -= length // 2
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": positions.expand(rows, length).clone(),
        "real": torch.ones(rows, length, dtype=torch.bool),
    }


def _fused(shape: PretrainedConfig) -> PretrainedConfig:
    """A GPU's fused attention drops out within its kernel; the CPU's, which is traced, only goes without."""
    shape = copy.deepcopy(shape)
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(shape, name, None):
            setattr(shape, name, 0.0)
    return shape


def _drop_data(module: nn.Module, shapes: ShapesOnly) -> None:
    """Put fake tensors in the place of all parameters; those that were shared stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                made[parameter] = nn.Parameter(shapes.fake(parameter), parameter.requires_grad)
            owner._parameters[name] = made[parameter]
