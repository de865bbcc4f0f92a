"""Accuracy of an image classifier, and the head that a model has for new classes before anything is tuned.

Perplexity of text is perplexity.py's. Letters: N images, C classes, D hidden width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from ot_ray.data.images import LabelledImages, ordered_batches
from ot_ray.errors import DataError
from ot_ray.model import classes_of, prepare_head
from ot_ray.model.families import head_of

SCALE = 10.0
"""What the logits of a class-mean head are multiplied by: a cosine of 1 is a logit of about this much."""


def accuracy(
    model: PreTrainedModel,
    images: LabelledImages,
    processor: BaseImageProcessor,
    workers: int = 0,
    batch_size: int = 64,
) -> float:
    """The second figure of `loss_and_accuracy`, of the same arguments and errors."""
    return loss_and_accuracy(model, images, processor, workers, batch_size)[1]


def loss_and_accuracy(
    model: PreTrainedModel,
    images: LabelledImages,
    processor: BaseImageProcessor,
    workers: int = 0,
    batch_size: int = 64,
) -> tuple[float, float]:
    """Mean cross-entropy of the images' classes in nats, and the share of the images whose class has the highest
    logit; each image once.

    Args:
        model: its classes include those of the images; for the time put into evaluation mode, and from the CPU onto
            the first GPU where there is one.
        workers: threads that decode ahead.
        batch_size: images a pass.

    Raises:
        DataError: the images have classes that the model's head does not know (names both), or one does not open.
    """
    counted = images.with_classes(classes_of(model), "the model's head")
    loss, right = 0.0, 0
    for batch, logits in _passes(model, counted, processor, workers, batch_size):
        labels = batch["labels"].to(logits.device)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        right += int((logits.argmax(dim=-1) == labels).sum())
    return loss / len(counted), right / len(counted)


def class_mean_head(
    model: PreTrainedModel,
    images: LabelledImages,
    processor: BaseImageProcessor,
    workers: int = 0,
    batch_size: int = 64,
) -> None:
    """Give a model a head for the classes of the images, in closed form and in place: nearest class mean by cosine.

    With x the head's input, m_c its mean over the images of class c, and m the mean of the m_c:
    ``logit_c = SCALE <x - m, m_c - m> / (|m_c - m| r)``, where r is the mean of ``|x - m|`` over the images. This is
    what zero-shot means for classes that a model was not trained on, and where tuning starts.

    Raises:
        DataError: there are fewer than two classes, a class without an image, or an image does not open.
        UnsupportedModelError: the model is no image classifier.
    """
    images.require_classes()
    empty = sorted(set(range(len(images.classes))) - set(images.labels))
    if empty:
        raise DataError(
            f"{images.where}: class {images.classes[empty[0]]} and {len(empty) - 1} more have no image to learn from; "
            "add some, or leave the classes out"
        )
    prepare_head(model, images.classes, seed=0)
    features_ND = _features(model, images, processor, workers, batch_size)
    weight_CD, bias_C = class_means(features_ND, torch.tensor(images.labels, device=features_ND.device))
    head = head_of(model)
    assert head is not None
    with torch.no_grad():
        head.weight.copy_(weight_CD)
        head.bias.copy_(bias_C)


def class_means(features_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] of `class_mean_head`, from features of every class 0..C-1."""
    features_ND = features_ND.double()
    count = int(labels_N.max()) + 1
    means_CD = torch.stack([features_ND[labels_N == label].mean(dim=0) for label in range(count)])
    centre_D = means_CD.mean(dim=0)
    radius = (features_ND - centre_D).norm(dim=-1).mean()
    weight_CD = F.normalize(means_CD - centre_D, dim=-1) * (SCALE / radius)
    return weight_CD, -(weight_CD @ centre_D)


def _features(
    model: PreTrainedModel, images: LabelledImages, processor: BaseImageProcessor, workers: int, batch_size: int
) -> Tensor:
    """What the head is given, [N, D]."""
    seen: list[Tensor] = []
    head = head_of(model)
    assert head is not None
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float()))
    try:
        for _ in _passes(model, images, processor, workers, batch_size):
            pass
    finally:
        hook.remove()
    return torch.cat(seen)


def _passes(
    model: PreTrainedModel, images: LabelledImages, processor: BaseImageProcessor, workers: int, batch_size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Each batch with its logits [rows, C]."""
    training, like = model.training, next(model.parameters())
    home = like.device
    device = torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
    # A model that is being tuned is of float32 where it learns and may be of bfloat16 where it is frozen.
    mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
    model.eval()
    try:
        model.to(device)  # type: ignore[arg-type]
        for batch in ordered_batches(images, processor, batch_size, workers):
            pixels = batch["pixel_values"].to(device, torch.float32 if mixed else like.dtype)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                logits = model(pixel_values=pixels).logits
            yield batch, logits
    finally:
        model.train(training).to(home)  # type: ignore[arg-type]
