"""A causal language model as the training loop wants it: packed batch in, loss out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ot_ray.model.distill import body_output
from ot_ray.model.families import layers_of
from ot_ray.model.losses import LanguageHead


class LanguageModel(nn.Module):
    """Wraps a full, emulated, plug-in or PEFT model. Letters: B rows, T positions.

    Args:
        accuracy: say of each batch how often the likeliest token is the label, too.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, accuracy: bool = False) -> None:
        super().__init__()
        self._accuracy = accuracy
        # PEFT puts its layers into the base model; its own wrapper would pass by the model's hooks.
        self.model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
        # After the model, so that the parameters which both hold go by their names in the model.
        self.head = LanguageHead(self.model)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """All int64 [B, T] (`real` bool), as the packer makes them; labels are not shifted.

        Returns:
            `loss`, the mean over rows of each row's mean cross-entropy over its tokens that are learnt, a
            float32 scalar; `token_accuracy`, counted so too, where it is asked for.
        """
        hidden = body_output(self.model, input_ids, position_ids)
        if not self._accuracy:
            return {"loss": self.head(hidden, labels)}
        loss, right = self.head(hidden, labels, accuracy=True)
        return {"loss": loss, "token_accuracy": right}


@contextmanager
def compiled_layers(model: PreTrainedModel | PeftModel, wanted: bool = True) -> Iterator[None]:
    """Run the transformer layers of a model through `torch.compile` for a while, each by itself.

    Args:
        wanted: False leaves them as they are.
    """
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    layers = list(layers_of(inner)) if wanted else []
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            # What was compiled holds on to the graph of its shapes, and keeps a model from being copied.
            layer._compiled_call_impl = None
