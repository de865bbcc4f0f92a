"""Where labelled images come from, as a setting."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from ot_ray.config import Config
from ot_ray.data.documents import HUB
from ot_ray.data.files import S3
from ot_ray.data.images.named import DATASETS

TEST = "test"


class ImageConfig(Config):
    """One source of images with their classes."""

    source: str = Field(min_length=1)
    """A folder of class folders (`pets/cat/1.jpg`), such a folder in a bucket (`s3://bucket/pets?endpoint_url=...`),
    `hub:owner/name[/config]` for a Hugging Face data set (or `hub:` and a folder that holds one), or one of the short
    names flowers, cars, pets, food, cifar10, cifar100. A folder with images of its own and no class folders gives
    images without classes, which serve for distilling alone."""

    split: str | None = Field(default=None, min_length=1)
    """Split of a data set; unset, `train`. For a short name, `test` means the split that results are reported on.
    Folders have none: name the split's own folder."""

    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a data set on the hub; unset, its main branch as it is when it is read."""

    image_column: str | None = Field(default=None, min_length=1)
    """Column of a data set that holds the images; unset, its only one of that type."""

    label_column: str | None = Field(default=None, min_length=1)
    """Column of a data set that holds the classes; unset, its only one of that type."""

    per_class: int | None = Field(default=None, ge=1)
    """The most images of each class, the first in order; unset, all."""

    workers: int = Field(default=2, ge=0)
    """Threads that decode the next images while a step runs; 0 decodes between the steps."""

    @model_validator(mode="after")
    def _fits_the_source(self) -> ImageConfig:
        if self.dataset is None:
            given = [
                name
                for name in ("split", "revision", "image_column", "label_column")
                if getattr(self, name) is not None
            ]
            if given:
                raise ValueError(
                    f"{given[0]} is {getattr(self, given[0])!r}, but source {self.name!r} is a folder; leave it out, "
                    "and name the folder of the images that are meant"
                )
        elif not self.dataset:
            raise ValueError("source names no data set; write hub:owner/name")
        return self

    @property
    def short_name(self) -> str | None:
        """The short name that is the source, or None; a folder of that name goes first."""
        return self.source if self.source in DATASETS and not Path(self.source).is_dir() else None

    @property
    def dataset(self) -> str | None:
        """The Hugging Face data set that is the source, or None if a folder is."""
        if self.short_name is not None:
            return DATASETS[self.short_name].repository
        return self.source.removeprefix(HUB) if self.source.startswith(HUB) else None

    @property
    def chosen_split(self) -> str:
        """The split of a data set."""
        if self.short_name is not None and self.split == TEST:
            return DATASETS[self.short_name].test
        return self.split or "train"

    @property
    def name(self) -> str:
        """The source for messages: without what stands in an address's query."""
        return self.source.partition("?")[0] if self.source.startswith(S3) else self.source
