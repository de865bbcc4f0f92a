"""What identifies the images of a source, without decoding them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ot_ray.data.digest import file_sha256, resolved_revision
from ot_ray.data.documents import HUB, DataConfig
from ot_ray.data.files import S3, FileInfo, Files, LocalFiles
from ot_ray.data.images.config import ImageConfig
from ot_ray.data.images.folder import files_below
from ot_ray.errors import DataError


def image_digest(config: ImageConfig, files: Files | None = None) -> str:
    """A sha256 that is equal for equal images of equal classes, wherever they lie.

    Files count by name below the folder and content, in a bucket by ETag instead of content; a data set of the hub
    by name and commit.

    Args:
        files: lists the files of `s3://` sources.

    Raises:
        DataError: nothing is found there, a file in a bucket has no ETag, or a commit cannot be learnt.
        ConfigError: an `s3://` source without `files`.
        MissingDependencyError: a data set of the hub needs the `eval` extra.
    """
    settings: dict[str, Any] = {"per_class": config.per_class}
    if config.dataset:
        settings |= {"split": config.chosen_split, "image": config.image_column, "label": config.label_column}
        content = _dataset(config, config.dataset)
    else:
        content = [[name, info.size, _mark(config, info)] for name, info in files_below(config, files)[0]]
    return hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode()).hexdigest()


def resolved_image_revision(config: ImageConfig) -> str | None:
    """The commit of the hub that `config` names now; None where the source is no data set there. Raises DataError."""
    if config.dataset is None:
        return None
    return resolved_revision(DataConfig(source=f"{HUB}{config.dataset}", revision=config.revision))


def _dataset(config: ImageConfig, name: str) -> list[Any]:
    if Path(name).is_dir():
        found = LocalFiles().list(name)
        return [[Path(info.key).relative_to(name).as_posix(), info.size, file_sha256(info.key)] for info in found]
    return [name, resolved_image_revision(config)]


def _mark(config: ImageConfig, info: FileInfo) -> str:
    if not config.source.startswith(S3):
        return file_sha256(info.key)
    if not info.etag:
        raise DataError(f"{info.key}: the bucket keeps no checksum or ETag of it; upload it again")
    return info.etag
