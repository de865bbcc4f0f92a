"""Method `full`: everything in the adapter layers is tuned."""

from __future__ import annotations

from transformers import PreTrainedModel

from ot_ray.model.split import SplitPlan, freeze_all_but_adapter


def prepare(model: PreTrainedModel, plan: SplitPlan) -> PreTrainedModel:
    """Leave gradients on for the adapter layers, and return `model`."""
    freeze_all_but_adapter(model, plan)
    return model
