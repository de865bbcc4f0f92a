"""Image data sets of the Hugging Face hub, and folders that hold one."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any, BinaryIO

from ot_ray.data.images.config import ImageConfig
from ot_ray.data.images.labelled import NO_LABEL, LabelledImages, listed
from ot_ray.data.images.named import DATASETS
from ot_ray.errors import DataError, MissingDependencyError


class RowShelf:
    """Images in the rows of a data set that keeps their bytes."""

    def __init__(self, rows: Any, column: str, where: str) -> None:
        self._rows, self._column, self._where = rows, column, where

    def name(self, index: int) -> str:
        """Data set and row."""
        return f"{self._where}, row {index}"

    def open(self, index: int) -> BinaryIO:
        """The bytes. Raises DataError where the row names a file instead of holding its bytes."""
        data = (self._rows[index][self._column] or {}).get("bytes")
        if data is None:
            # A path comes from outside, and could name any file of this machine.
            raise DataError(f"{self.name(index)}: holds no image bytes; embed the images in the data set")
        return io.BytesIO(data)


def hub_images(config: ImageConfig) -> LabelledImages:
    """The images of a data set, in its order. Downloaded, into the usual cache, when they are not there.

    Raises:
        DataError: the data set, its split or a column cannot be had; names those that can.
        MissingDependencyError: datasets is not installed.
    """
    assert config.dataset is not None
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MissingDependencyError(
            f"hub:{config.dataset} is a Hugging Face data set and needs datasets: pip install 'ot_ray[eval]'"
        ) from None
    where = f"hub:{config.dataset}, split {config.chosen_split}"
    rows = _load(datasets, config, where)
    known = DATASETS.get(config.short_name or "")
    image = _column(rows, config.image_column or (known.image if known else None), datasets.Image, "image", where)
    label = _column(rows, config.label_column or (known.label if known else None), datasets.ClassLabel, "label", where)
    values = [NO_LABEL if value is None or value < 0 else value for value in rows[label]]
    return LabelledImages(
        where=where,
        classes=tuple(rows.features[label].names),
        labels=tuple(values),
        shelf=RowShelf(rows.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image, where),
        places=tuple(range(len(values))),
    )


def _load(datasets: Any, config: ImageConfig, where: str) -> Any:
    name = config.dataset or ""
    # A path is never a config's name, so a misspelt folder is reported whole.
    local = Path(name).is_dir() or name.startswith(("/", "."))
    parts = name.split("/")
    path, subset = (name, None) if local else ("/".join(parts[:2]), "/".join(parts[2:]) or None)
    try:
        if local and _saved(Path(name)):
            return _split_of(datasets.load_from_disk(name), config, where)
        return datasets.load_dataset(
            path, subset, split=config.chosen_split, revision=None if local else config.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{where}: cannot be loaded: {reason}; check the name (owner/name/config), the split and the network"
        ) from None


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _split_of(saved: Any, config: ImageConfig, where: str) -> Any:
    if not isinstance(saved, dict):
        return saved
    if config.chosen_split not in saved:
        raise DataError(f"{where}: there is no such split; use one of {', '.join(saved)}")
    return saved[config.chosen_split]


def _column(rows: Any, wanted: str | None, kind: type, name: str, where: str) -> str:
    fitting = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    if wanted is None and len(fitting) == 1:
        return fitting[0]
    if wanted in fitting:
        assert wanted is not None
        return wanted
    have = listed(fitting) if fitting else "none"
    asked = f"{name}_column is {wanted!r}" if wanted else f"{name}_column is not set"
    raise DataError(
        f"{where}: {asked}, and the columns of type {kind.__name__} are: {have}; of all columns "
        f"{listed(list(rows.features))} name one of that type"
    )
