"""Images with their classes, whatever holds them; each is read and decoded when it is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

from PIL import Image

from ot_ray.data.images.decoding import decode
from ot_ray.errors import DataError

NO_LABEL = -100
"""Label of an image without a class; losses and accuracies leave it out."""

_MOST_NAMES = 10


class Shelf(Protocol):
    """Holds the bytes of images; asked by several threads at once."""

    def name(self, index: int) -> str:
        """How messages call an image."""
        ...

    def open(self, index: int) -> BinaryIO:
        """The bytes of an image from their beginning. Raises OSError or DataError."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """Images in a fixed order."""

    where: str
    """The source, for messages."""
    classes: tuple[str, ...]
    """Names of the classes; empty where the images have none."""
    labels: tuple[int, ...]
    """For each image its place in `classes`, or NO_LABEL."""
    shelf: Shelf
    """The bytes."""
    places: tuple[int, ...]
    """For each image its number on the shelf."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """How messages call an image."""
        return self.shelf.name(self.places[index])

    def load(self, index: int) -> Image.Image:
        """The image in RGB, upright.

        Raises:
            DataError: it does not open; names it.
        """
        try:
            with self.shelf.open(self.places[index]) as stream:
                data = stream.read()
        except OSError as error:
            raise DataError(f"{self.name(index)}: cannot be read: {error.strerror or error}") from None
        return decode(data, self.name(index))

    def few(self, per_class: int | None) -> LabelledImages:
        """The first `per_class` images of each class; all of them for None."""
        if per_class is None:
            return self
        seen: dict[int, int] = defaultdict(int)
        chosen = []
        for index, label in enumerate(self.labels):
            seen[label] += 1
            if seen[label] <= per_class:
                chosen.append(index)
        return replace(
            self,
            labels=tuple(self.labels[i] for i in chosen),
            places=tuple(self.places[i] for i in chosen),
        )

    def require_classes(self) -> None:
        """Refuse images of which some, or all, have no class. Raises DataError."""
        bare = [i for i, label in enumerate(self.labels) if label == NO_LABEL]
        if bare:
            raise DataError(
                f"{self.where}: {len(bare)} of {len(self)} images have no class, {self.name(bare[0])} among them; "
                "put each image into a folder named after its class"
            )

    def with_classes(self, classes: Sequence[str], whose: str) -> LabelledImages:
        """The same images, their labels counted in the classes of a model's head. Classes that none of the images
        has do no harm.

        Args:
            whose: how messages call the head.

        Raises:
            DataError: images are of a class that the head does not know; names the classes of both.
        """
        self.require_classes()
        place = {name: number for number, name in enumerate(classes)}
        used = {self.classes[label] for label in set(self.labels)}
        unknown = sorted(used - place.keys())
        if unknown:
            raise DataError(
                f"{self.where}: the images are of classes {listed(unknown)}, which {whose} does not know: its classes "
                f"are {listed(classes)}; use images of these classes, or a head made for the others"
            )
        labels = tuple(place[self.classes[label]] for label in self.labels)
        return replace(self, classes=tuple(classes), labels=labels)


def listed(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
