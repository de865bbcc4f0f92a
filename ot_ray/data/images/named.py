"""The six image data sets of the paper's Table 3 by short names: where the hub has them and how they are laid out."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ot_ray.errors import ConfigError


@dataclass(frozen=True)
class NamedDataset:
    """One data set on the Hugging Face hub."""

    repository: str
    """Its name there."""
    image: str
    """Column of the images."""
    label: str
    """Column of the classes."""
    test: str
    """The split on which results are reported."""


DATASETS: dict[str, NamedDataset] = {
    "flowers": NamedDataset("nelorth/oxford-flowers", "image", "label", "test"),
    "cars": NamedDataset("tanganke/stanford_cars", "image", "label", "test"),
    "pets": NamedDataset("timm/oxford-iiit-pet", "image", "label", "test"),
    "food": NamedDataset("ethz/food101", "image", "label", "validation"),
    "cifar10": NamedDataset("uoft-cs/cifar10", "img", "label", "test"),
    "cifar100": NamedDataset("uoft-cs/cifar100", "img", "fine_label", "test"),
}


def named(name: str) -> NamedDataset:
    """The data set of a short name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? Otherwise" if near else f"name one of {', '.join(DATASETS)};"
    raise ConfigError(
        f"images.source is {name!r}, which is no folder and no data set known by a short name; {hint} pass a folder, "
        "an s3:// address or hub:owner/name"
    )
