"""Method `bitfit`: the vectors of the adapter layers are tuned (Ben Zaken et al. 2022)."""

from __future__ import annotations

from transformers import PreTrainedModel

from ot_ray.model.families import layers_of
from ot_ray.model.split import SplitPlan, freeze_all_but_adapter


def prepare(model: PreTrainedModel, plan: SplitPlan) -> PreTrainedModel:
    """Leave gradients on for the vectors of the adapter layers, and return `model`.

    These are the biases of the linear maps, and the weights and biases of the norms: with both, the counts are
    those of the Offsite-Tuning paper's Table 5. An architecture without biases (Llama) has its norms' weights alone.
    """
    freeze_all_but_adapter(model, plan)
    layers = layers_of(model)
    for position in plan.adapter_positions(len(layers)):
        for parameter in layers[position].parameters():
            parameter.requires_grad_(parameter.dim() == 1)
    return model
