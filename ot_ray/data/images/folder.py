"""A folder of class folders, on this machine or in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from ot_ray.data.files import S3, FileInfo, Files, LocalFiles
from ot_ray.data.images.config import ImageConfig
from ot_ray.data.images.labelled import NO_LABEL, LabelledImages
from ot_ray.data.images.named import named
from ot_ray.errors import ConfigError, DataError

_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
"""Names of folders that hold a split rather than a class."""
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif"})


class FileShelf:
    """Images that are files."""

    def __init__(self, keys: Sequence[str], files: Files, prefix: str) -> None:
        self._keys, self._files, self._prefix = keys, files, prefix

    def name(self, index: int) -> str:
        """Path or address."""
        return f"{self._prefix}{self._keys[index]}"

    def open(self, index: int) -> BinaryIO:
        """The file."""
        return self._files.open(self._keys[index])


def folder_images(config: ImageConfig, files: Files | None = None) -> LabelledImages:
    """The images of a folder, sorted by class and name. What lies deeper in a class folder is of that class; files
    that stand beside class folders are left alone if they are no images.

    Args:
        files: opens the files of `s3://` sources.

    Raises:
        DataError: there is no such folder, it holds no image, or splits instead of classes, or images stand beside
            class folders.
        ConfigError: an `s3://` source without `files`; a source that is neither folder nor data set.
    """
    found, opener, prefix = files_below(config, files)
    rows = [(PurePosixPath(relative).parts, info) for relative, info in found]
    classes = sorted({parts[0] for parts, _ in rows if len(parts) > 1})
    _refuse_splits(config, classes)
    beside = [info.key for parts, info in rows if len(parts) == 1 and _is_image(info)]
    if classes and beside:
        raise DataError(
            f"{prefix}{beside[0]} and {len(beside) - 1} more images stand beside the class folders "
            f"{', '.join(classes[:10])}; put each into the folder of its class"
        )
    if classes:
        rows = [(parts, info) for parts, info in rows if len(parts) > 1]
    else:
        rows = [(parts, info) for parts, info in rows if _is_image(info)]
    if not rows:
        raise DataError(f"{config.name}: no images lie there; put them into folders named after their classes")
    place = {name: number for number, name in enumerate(classes)}
    return LabelledImages(
        where=config.name,
        classes=tuple(classes),
        labels=tuple(place[parts[0]] if classes else NO_LABEL for parts, _ in rows),
        shelf=FileShelf([info.key for _, info in rows], opener, prefix),
        places=tuple(range(len(rows))),
    )


def files_below(config: ImageConfig, files: Files | None) -> tuple[list[tuple[str, FileInfo]], Files, str]:
    """All files of a folder but hidden ones: their names below it, sorted, with what opens them, and what stands
    before their keys in messages.

    Raises:
        DataError: there is no such folder.
        ConfigError: an `s3://` source without `files`; a source that is neither folder nor data set.
    """
    if not config.source.startswith(S3):
        path = Path(config.source).expanduser()
        if not path.is_dir():
            _refuse(config, path)
        local = LocalFiles()
        found = [(Path(info.key).relative_to(path).as_posix(), info) for info in local.list(str(path))]
        return sorted(found, key=lambda item: item[0]), local, ""
    if files is None:
        raise ConfigError(f"images.source is in a bucket ({config.name}), which needs `files` to open it; pass files=")
    address = urlsplit(config.source)
    folder = unquote(address.path).strip("/")
    start = f"{folder}/" if folder else ""
    below = [(info.key.removeprefix(start), info) for info in files.list(folder)]
    visible = [(name, info) for name, info in below if not any(part.startswith(".") for part in name.split("/"))]
    return sorted(visible, key=lambda item: item[0]), files, f"{S3}{address.netloc}/"


def _refuse_splits(config: ImageConfig, classes: Sequence[str]) -> None:
    splits = [name for name in classes if name.lower() in _SPLITS]
    # A lone class of such a name may be meant; two, or nothing else, are a data set cut for training and testing.
    if len(splits) > 1 or (splits and len(splits) == len(classes)):
        folder = config.name.rstrip("/")
        raise DataError(
            f"{config.name}: its folders {', '.join(splits)} are splits and no classes; name one of them, say "
            f"images.source={folder}/{'train' if 'train' in splits else splits[0]}"
        )


def _refuse(config: ImageConfig, path: Path) -> None:
    if path.exists():
        raise DataError(f"{config.source}: is a file; name the folder that holds the class folders")
    if path.name == config.source:
        named(config.source)
    raise DataError(f"{config.source}: there is no such folder; name one that holds class folders")


def _is_image(info: FileInfo) -> bool:
    return PurePosixPath(info.key).suffix.lower() in _SUFFIXES
