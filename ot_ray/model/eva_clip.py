"""EVA-CLIP ViT-g, BLIP-2's vision tower, with a linear head: Transformers has the tower and no classifier of it.

Importing this makes `AutoModelForImageClassification` open such a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, Blip2VisionConfig, Blip2VisionModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.blip_2.modeling_blip_2 import Blip2PreTrainedModel
from transformers.utils.generic import can_return_tuple


class EvaClipForImageClassification(Blip2PreTrainedModel):
    """A linear map on the mean of the patch tokens, as `CLIPForImageClassification` has it.

    Tensors are named as in checkpoints of BLIP-2 (`vision_model.…`), with `classifier.weight` [C, D] and
    `classifier.bias` [C] beside them; C classes, D hidden width.
    """

    config_class = Blip2VisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__(config)
        self.num_labels = len(config.id2label or {})
        self.vision_model = Blip2VisionModel._from_config(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Pixels float [B, 3, H, W], labels int64 [B]; logits [B, C] and, where there are labels, the mean
        cross-entropy."""
        output = self.vision_model(pixel_values, **kwargs)
        logits = self.classifier(output.last_hidden_state[:, 1:].mean(dim=1))
        return ImageClassifierOutput(
            loss=None if labels is None else cross_entropy(logits.float(), labels),  # type: ignore[arg-type]
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoModelForImageClassification.register(Blip2VisionConfig, EvaClipForImageClassification, exist_ok=True)
