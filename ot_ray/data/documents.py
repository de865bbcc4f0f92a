"""Where training text comes from: a file, a glob, a folder or a Hugging Face dataset, as one stream.

Reading each format is `readers`' part; tokenising and packing come after."""

from __future__ import annotations

import difflib
import glob
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ot_ray.config import Config
from ot_ray.data.examples import Document
from ot_ray.data.readers import read_hub, read_jsonl, read_parquet, read_text
from ot_ray.errors import DataError

HUB = "hub:"
SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
}
_FORMATS = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}


class DataConfig(Config):
    """One source of documents."""

    source: str = Field(min_length=1)
    """A file, a glob such as `corpus/*.jsonl`, a folder (searched through), or `hub:owner/name[/config]`
    for a Hugging Face dataset."""

    format: Literal["auto", "text", "jsonl", "parquet", "hub"] = "auto"
    """How the files are read; `auto` goes by each file's suffix."""

    split: str = Field(default="train", min_length=1)
    """The split of a Hugging Face dataset."""

    text_field: str = Field(default="text", min_length=1)
    """The key or column that holds the text of plain-text rows."""

    document_separator: str | None = Field(default=None, min_length=1)
    """What divides a text file into documents; without it, one file is one document."""

    limit: int | None = Field(default=None, ge=1)
    """The most documents to read; without it, all."""

    @model_validator(mode="after")
    def _formats_agree(self) -> DataConfig:
        if self.source.startswith(HUB) and self.format not in ("auto", "hub"):
            raise ValueError(f"source {self.source!r} is a dataset, but format is {self.format!r}; use 'hub'")
        if self.format == "hub" and not self.source.removeprefix(HUB):
            raise ValueError("source names no dataset; write hub:owner/name")
        return self


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Stream the documents of a source; of several files, in the order of their paths.

    Raises:
        DataError: nothing is found there, or a file or row is not valid; the message names file and line.
        MissingDependencyError: Parquet files or Hugging Face datasets need the `eval` extra.
    """
    return itertools.islice(_all_documents(config), config.limit)


def find_files(config: DataConfig) -> list[Path]:
    """The files of a source that is no Hugging Face dataset, sorted by path.

    Raises:
        DataError: there is none; the nearest names are suggested.
    """
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _files_in(path, config.format)
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"{config.source}: no file matches; check the pattern")
        return found
    raise _not_found(path)


def _all_documents(config: DataConfig) -> Iterator[Document]:
    if config.format == "hub" or config.source.startswith(HUB):
        yield from read_hub(config.source.removeprefix(HUB), config.split, config.text_field)
        return
    for path in find_files(config):
        kind = _format_of(path) if config.format == "auto" else config.format
        if kind == "text":
            yield from read_text(path, config.document_separator)
        elif kind == "jsonl":
            yield from read_jsonl(path, config.text_field)
        else:
            yield from read_parquet(path, config.text_field)


def _format_of(path: Path) -> str:
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise DataError(
            f"{path}: cannot tell the format by the suffix {path.suffix!r} (known: {', '.join(_FORMATS)}); "
            "set data.format"
        ) from None


def _files_in(folder: Path, kind: str) -> list[Path]:
    suffixes = tuple(_FORMATS) if kind == "auto" else SUFFIXES[kind]
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise DataError(f"{folder}: the folder holds no {', '.join(suffixes)} file; name the file itself")
    return found


def _not_found(path: Path) -> DataError:
    if not path.parent.is_dir():
        return DataError(f"{path}: there is no folder {path.parent}; pass an existing file, folder or glob")
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, sorted(names), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "pass an existing file, folder or glob"
    return DataError(f"{path}: no such file; {hint}")
