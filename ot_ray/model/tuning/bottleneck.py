"""Method `bottleneck`: two Houlsby bottlenecks in each adapter layer are tuned, and nothing that was there before.

The module itself, which plugging in needs as well, is in model/bottleneck.py."""

from __future__ import annotations

from pydantic import Field
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.model.bottleneck import bottleneck_places, insert_bottleneck
from ot_ray.model.families import family_of, layers_of
from ot_ray.model.split import SplitPlan


class BottleneckSettings(Config):
    """Bottlenecks behind the attention and the MLP of every adapter layer (Houlsby et al. 2019)."""

    size: int = Field(default=64, ge=1)
    """Width of a bottleneck; the Offsite-Tuning paper's Table 5 has 64."""


def prepare(model: PreTrainedModel, plan: SplitPlan, settings: BottleneckSettings) -> PreTrainedModel:
    """Put bottlenecks into `model`, in place, leave gradients on for them alone, and return it.

    The untuned model computes what it did before, bit for bit.

    Raises:
        UnsupportedModelError: the architecture is set up to pass by its linear maps.
    """
    model.requires_grad_(False)
    layers = layers_of(model)
    for position in plan.adapter_positions(len(layers)):
        for place in bottleneck_places(family_of(model)):
            insert_bottleneck(model, layers[position], place, settings.size).start()
    return model
