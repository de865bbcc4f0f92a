"""Opening a customer's images, every one of which must have a class."""

from __future__ import annotations

from ot_ray.data.images import ImageConfig, LabelledImages, load_images
from ot_ray.training.text_source import image_files


def labelled_images(config: ImageConfig) -> LabelledImages:
    """The images of a source, whose headers have been looked at. Raises DataError where one has no class."""
    images = load_images(config, image_files(config.source))
    images.require_classes()
    return images
