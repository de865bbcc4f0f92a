"""The batches that layers and their smaller maps are chosen by; the nightly job and a study see the same ones.

How layers are chosen is the model room's affair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import BaseImageProcessor

from ot_ray.data import PackedSequence, collate
from ot_ray.data.images import ImageBatches, LabelledImages

ROWS = 4
"""Rows of a batch; no setting, because the `gradient` choice compares batch by batch."""


def calibration_text(sequences: Sequence[PackedSequence]) -> Iterator[dict[str, Tensor]]:
    """Every sequence once, in order; the last batch may be smaller."""
    return (collate(sequences[start : start + ROWS]) for start in range(0, len(sequences), ROWS))


def calibration_images(
    images: LabelledImages, processor: BaseImageProcessor, count: int
) -> Iterator[dict[str, Tensor]]:
    """`count` images, or all where there are fewer, rounded up to whole batches. Raises DataError."""
    # Folders list one class after the other; the order of an epoch mixes them.
    drawn = ImageBatches(images, processor, min(ROWS, len(images)), seed=0)
    return (drawn.next_batch() for _ in range(0, min(count, len(images)), ROWS))
