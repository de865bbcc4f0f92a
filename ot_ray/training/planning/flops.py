"""Floating-point operations of distilling: what the mathematics needs, so activations computed again count nothing."""

from __future__ import annotations

from transformers import PretrainedConfig

from ot_ray.model import SplitPlan, uniform_layers
from ot_ray.training.planning.parts import Parts


def flops_of(parts: Parts, shape: PretrainedConfig, plan: SplitPlan, length: int) -> float:
    """Floating-point operations of distilling, a token, on average over a sequence.

    A product with a matrix of P entries is 2 P a token. Forward runs A1, M, E, A2 and the head; backward
    needs the gradients by inputs and weights of E (4 P) and by the inputs of A2 and the head (2 P). Attention
    adds 4 times its width a token and visible position forward, twice that backward, where the mask lets
    a token see what stands before it (and in its window).
    """
    middle = plan.middle(len(parts.layer_matrices))
    students = [middle[i] for i in uniform_layers(len(middle), plan.keep)]
    matrices = [2.0 * entries for entries in parts.layer_matrices]
    attention = [4.0 * _width(shape) * _visible(shape, i, length) for i in range(len(matrices))]
    forward = sum(matrices) + sum(attention) + 2.0 * parts.output
    forward += sum(matrices[i] + attention[i] for i in students)
    backward = sum(2 * matrices[i] + 2 * attention[i] for i in students) + 2.0 * parts.output
    backward += sum(matrices[i] + 2 * attention[i] for i in range(middle.stop, len(matrices)))
    return forward + backward


def _width(shape: PretrainedConfig) -> int:
    heads = shape.num_attention_heads
    return heads * (getattr(shape, "head_dim", None) or shape.hidden_size // heads)


def _visible(shape: PretrainedConfig, layer: int, length: int) -> float:
    """Positions that a token sees in a layer, on average over a sequence."""
    kinds = getattr(shape, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    window = (getattr(shape, "sliding_window", None) if slides else None) or length
    window = min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
