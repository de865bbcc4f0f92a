"""From a setting to labelled images whose headers have been looked at; decoding comes when they are asked for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from ot_ray.data.files import Files
from ot_ray.data.images.config import ImageConfig
from ot_ray.data.images.decoding import check_header
from ot_ray.data.images.folder import folder_images
from ot_ray.data.images.hub import hub_images
from ot_ray.data.images.labelled import LabelledImages
from ot_ray.data.load import QUIET_SECONDS
from ot_ray.errors import DataError
from ot_ray.progress import Progress

_MOST_NAMES = 10
_READERS = 8


def load_images(config: ImageConfig, files: Files | None = None, *, checked: bool = False) -> LabelledImages:
    """Find the images of a source and make sure, by their headers, that they open.

    Args:
        files: opens the files of `s3://` sources.
        checked: the headers were looked at before, say by whoever started this rank.

    Raises:
        DataError: nothing is found there, or images do not open: how many, and the first ten by name.
        ConfigError: an `s3://` source without `files`; an unknown short name.
        MissingDependencyError: a Hugging Face data set needs the `eval` extra.
    """
    images = (hub_images(config) if config.dataset else folder_images(config, files)).few(config.per_class)
    if not len(images):
        raise DataError(f"{images.where}: there are no images; choose another split or folder")
    if not checked:
        check_images(images)
    return images


def check_images(images: LabelledImages) -> None:
    """Open every image's header. A file that is damaged further on is met when it is decoded.

    Raises:
        DataError: how many do not open, and the first ten by name, with the reasons.
    """

    def reason(index: int) -> str | None:
        try:
            with images.shelf.open(images.places[index]) as stream:
                return check_header(stream)
        except DataError:
            return "it holds no image bytes"
        except OSError as error:
            return error.strerror or str(error)

    broken: list[str] = []
    count, start = 0, time.monotonic()
    # Threads, because a bucket answers each request late and many at once.
    with ThreadPoolExecutor(_READERS, "image-headers") as pool, ExitStack() as stack:
        bar = None
        for index, found in enumerate(pool.map(reason, range(len(images)))):
            if found is not None:
                count += 1
                broken += [f"{images.name(index)} ({found})"] if count <= _MOST_NAMES else []
            if bar is not None:
                bar.advance()
            elif time.monotonic() - start > QUIET_SECONDS:
                bar = stack.enter_context(Progress("images", len(images), "image"))
                bar.advance(index + 1)
    if count:
        more = f"; and {count - _MOST_NAMES} more" if count > _MOST_NAMES else ""
        raise DataError(
            f"{images.where}: {count} of {len(images)} images do not open: {'; '.join(broken)}{more}. "
            "Replace or remove them"
        )
