"""Labelled images to batches: class folders, buckets and Hugging Face datasets, decoded as they are asked for.

What a model wants of an image is its own processor's affair; augmentation is left out."""

from __future__ import annotations

from ot_ray.data.images.batches import ImageBatches, images_at, ordered_batches
from ot_ray.data.images.config import ImageConfig
from ot_ray.data.images.digest import image_digest, resolved_image_revision
from ot_ray.data.images.labelled import NO_LABEL, LabelledImages
from ot_ray.data.images.load import load_images
from ot_ray.data.images.named import DATASETS, NamedDataset

__all__ = [
    "DATASETS",
    "NO_LABEL",
    "ImageBatches",
    "ImageConfig",
    "LabelledImages",
    "NamedDataset",
    "image_digest",
    "images_at",
    "load_images",
    "ordered_batches",
    "resolved_image_revision",
]
