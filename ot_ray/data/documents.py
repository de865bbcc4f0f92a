"""Where training text comes from: files, a bucket or a Hugging Face dataset, as one stream of documents.

Finding files is `files`' part and reading each format `readers`'; tokenising and packing come after."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from ot_ray.config import Config
from ot_ray.data.examples import Document, parse_row
from ot_ray.data.files import S3, Files, LocalFiles, find_files
from ot_ray.data.readers import BEGINNING, LONGEST_TEXT, Place, Record, parse_record, read_hub, read_records
from ot_ray.data.tasks import TEXT, read_task

HUB = "hub:"
TASK = "task:"


class DataConfig(Config):
    """One source of documents."""

    source: str = Field(min_length=1)
    """A file, a glob such as `corpus/*.jsonl.zst`, a folder (searched through), one of these in a bucket,
    `s3://bucket/corpus/*.jsonl?endpoint_url=...`, `hub:owner/name[/config]` for a Hugging Face dataset, or
    `task:name` for the examples of one of the lm-evaluation-harness's tasks, written as it scores them.
    Text and JSONL files may be compressed (`.gz`, `.zst`)."""

    format: Literal["auto", "text", "jsonl", "parquet", "hub"] = "auto"
    """How the files are read; `auto` goes by each file's suffix."""

    split: str = Field(default="train", min_length=1)
    """The split of a Hugging Face dataset, or of a task (`train`, `validation`, `test`)."""

    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a dataset on the Hugging Face hub; unset, its main branch as it is when it is read."""

    text_field: str = Field(default="text", min_length=1)
    """The key or column that holds the text of plain-text rows."""

    document_separator: str | None = Field(default=None, min_length=1)
    """What divides a text file into documents; without it, one file is one document."""

    limit: int | None = Field(default=None, ge=1)
    """The most documents to read; without it, all."""

    tasks_folder: str | None = Field(default=None, min_length=1)
    """For `task:name`: a folder of tasks of your own, in the harness's YAML. The Python functions that such files
    name are run, so it must be the operator's own folder, never one that somebody sent."""

    @model_validator(mode="after")
    def _formats_agree(self) -> DataConfig:
        if self.source.startswith(HUB) and self.format not in ("auto", "hub"):
            raise ValueError(f"source {self.source!r} is a dataset, but format is {self.format!r}; use 'hub'")
        if self.source.startswith(S3) and self.format == "hub":
            raise ValueError("source is in a bucket, but format is 'hub'; use 'auto'")
        if self.format == "hub" and not self.source.removeprefix(HUB):
            raise ValueError("source names no dataset; write hub:owner/name")
        if self.revision is not None and self.dataset is None:
            raise ValueError(f"revision is {self.revision!r}, but the source is no dataset on the hub; leave it out")
        if self.source == TASK or (self.source.startswith(TASK) and self.format != "auto"):
            raise ValueError(f"source is {self.source!r}; write task:name, and leave format out")
        if self.tasks_folder is not None and self.task is None:
            raise ValueError(f"tasks_folder is {self.tasks_folder!r}, but the source is no task; leave it out")
        return self

    @property
    def dataset(self) -> str | None:
        """The Hugging Face dataset that is the source, or None if files are."""
        is_dataset = self.format == "hub" or self.source.startswith(HUB)
        return self.source.removeprefix(HUB) if is_dataset else None

    @property
    def task(self) -> str | None:
        """The task of the lm-evaluation-harness that is the source, or None."""
        return self.source.removeprefix(TASK) if self.source.startswith(TASK) else None

    @property
    def name(self) -> str:
        """The source for messages: without what stands in an address's query."""
        return self.source.partition("?")[0] if self.source.startswith(S3) else self.source


class Source:
    """The files of one configuration, in the order of their names; a dataset or a task counts as one file.

    Picklable where `files` is. What is found is settled when it is made.

    Args:
        files: opens the files of `s3://` sources.

    Raises:
        DataError: nothing is found there.
        ConfigError: an `s3://` source without `files`.
    """

    def __init__(self, config: DataConfig, files: Files | None = None) -> None:
        self.config = config
        in_bucket = config.source.startswith(S3)
        self._opener = files if in_bucket and files is not None else LocalFiles()
        self.files = [] if config.dataset or config.task else find_files(config.source, config.format, files)

    @property
    def count(self) -> int:
        """How many files there are."""
        return 1 if self.config.dataset or self.config.task else len(self.files)

    def records(self, file: int, start: Place = BEGINNING, longest: int = LONGEST_TEXT) -> Iterator[Record]:
        """The records of file number `file` (from 0) from a place on. See `read_records` and `read_hub`."""
        if self.config.dataset:
            return read_hub(self.config.dataset, self.config.split, start, self.config.revision)
        if self.config.task:
            return read_task(self.config.task, self.config.split, self.config.tasks_folder, start)
        separator = self.config.document_separator
        return read_records(self.files[file], self._opener, self.config.text_field, separator, start, longest)

    def parse(self, file: int, record: Record) -> Document:
        """The document that a record of file number `file` holds.

        Raises:
            DataError: it is no valid document; the message names file and line.
        """
        if self.config.dataset:
            where = f"hub:{self.config.dataset}, split {self.config.split}, row {record.place.number}"
            return parse_row(record.raw, self.config.text_field, where)
        if self.config.task:
            where = f"{self.config.source}, split {self.config.split}, row {record.place.number}"
            return parse_row(record.raw, TEXT, where)
        return parse_record(record, self.files[file], self.config.text_field)


def read_documents(config: DataConfig, files: Files | None = None) -> Iterator[Document]:
    """Stream the documents of a source; of several files, in the order of their names.

    Args:
        files: opens the files of `s3://` sources.

    Raises:
        DataError: nothing is found there, or a file or row is not valid; the message names file and line.
        ConfigError: an `s3://` source without `files`.
        MissingDependencyError: Parquet files or Hugging Face datasets need the `eval` extra, tasks `lm-eval`.
    """
    return itertools.islice(_all_documents(config, files), config.limit)


def _all_documents(config: DataConfig, files: Files | None) -> Iterator[Document]:
    source = Source(config, files)
    for file in range(source.count):
        for record in source.records(file):
            yield source.parse(file, record)
