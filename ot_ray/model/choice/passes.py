"""Passes of a model over calibration batches, for the choices: its body alone, or the loss of tuning it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ot_ray.model.distill import body_output
from ot_ray.model.images import ImageModel
from ot_ray.model.language import LanguageModel

PIXELS = "pixel_values"


def run_body(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Run every layer on a batch of text or images; packed documents are kept apart."""
    if PIXELS in batch:
        model(pixel_values=batch[PIXELS])
    else:
        body_output(model, batch["input_ids"], batch.get("position_ids"))


def loss_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that tuning minimises, a float32 scalar."""
    return (ImageModel(model) if PIXELS in batch else LanguageModel(model))(**batch)["loss"]


def with_labels(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with something to learn: images get classes drawn from what the model says of them, always the same.

    Public images need not have classes, and where they do those need not be the model's; the Fisher matrix is defined
    by draws from the model.
    """
    if PIXELS not in batch:
        return dict(batch)
    with torch.no_grad():
        chances = model(pixel_values=batch[PIXELS]).logits.double().softmax(-1).cpu()
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(0)).flatten()
    return {PIXELS: batch[PIXELS], "labels": drawn.to(batch[PIXELS].device)}


def first_rows(
    batches: Iterable[Mapping[str, Tensor]], count: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The first `count` rows of batches, no more of which are asked for than that needs."""
    for batch in batches:
        size = min(count, len(next(iter(batch.values()))))
        yield {name: tensor[:size].to(device) for name, tensor in batch.items()}
        count -= size
        if count == 0:
            return


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every flag as it was at the end."""
    training = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in learning:
            parameter.requires_grad_(flag)
