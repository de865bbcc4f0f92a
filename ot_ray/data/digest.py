"""What identifies the text of a source, without tokenising it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

from ot_ray.data.documents import DataConfig
from ot_ray.data.files import S3, FileInfo, Files, LocalFiles, SourceFile, find_files
from ot_ray.data.tasks import read_task
from ot_ray.errors import DataError, MissingDependencyError

_TEXT_FIELDS = {"split", "text_field", "document_separator", "limit"}


def source_digest(config: DataConfig, files: Files | None = None) -> str:
    """A sha256 that is equal for equal content read in the same way, wherever the content lies.

    Local files count by name below the source and content; files in a bucket by key, size and ETag, which
    are read without the content; a Hugging Face dataset by name and commit; a task by its examples. How a
    stream shuffles or prefetches does not count.

    Args:
        files: lists the files of `s3://` sources.

    Raises:
        DataError: nothing is found there, a file in a bucket has no ETag, or a commit cannot be learnt.
        ConfigError: an `s3://` source without `files`.
        MissingDependencyError: a Hugging Face dataset needs the `eval` extra, a task `lm-eval`.
    """
    if config.task:
        content = _task(config, config.task)
    else:
        content = _dataset(config, config.dataset) if config.dataset else _files(config, files)
    settings = config.model_dump(mode="json", include=_TEXT_FIELDS)
    text = json.dumps([settings, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(config: DataConfig, files: Files | None) -> list[Any]:
    found = find_files(config.source, config.format, files)
    if config.source.startswith(S3):
        return [[file.info.key, file.kind, file.info.size, _etag(file)] for file in found]
    folder = os.path.commonpath([Path(file.info.key).absolute().parent for file in found])
    names = [Path(file.info.key).absolute().relative_to(folder).as_posix() for file in found]
    if len(names) == 1:
        # One file is the same text under any name.
        names = [""]
    return [[name, file.kind, *_content(file.info)] for name, file in zip(names, found, strict=True)]


def _etag(file: SourceFile) -> str:
    if not file.info.etag:
        raise DataError(f"{file.name}: the bucket keeps no checksum or ETag of it; upload it again")
    return file.info.etag


def _content(info: FileInfo) -> tuple[int, str]:
    return info.size, file_sha256(info.key)


def file_sha256(path: str) -> str:
    """The sha256 of a file of this machine. Raises DataError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def resolved_revision(config: DataConfig) -> str | None:
    """The commit of the Hugging Face hub that `config` names now; None where the source is no dataset there.

    With it as `config.revision`, reading goes on from the same text whatever is pushed later.

    Raises:
        DataError: it cannot be learnt.
        MissingDependencyError: it needs the `eval` extra.
    """
    name = config.dataset
    if name is None or Path(name).is_dir():
        return None
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise MissingDependencyError(
            f"hub:{name} is a Hugging Face dataset and needs huggingface_hub: pip install 'ot_ray[eval]'"
        ) from None
    repository = "/".join(name.split("/")[:2])
    try:
        commit = hub.HfApi().dataset_info(repository, revision=config.revision).sha
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"hub:{name}: its commit cannot be learnt: {reason}; check the name and the network") from None
    return commit


def _dataset(config: DataConfig, name: str) -> list[Any]:
    if Path(name).is_dir():
        infos = list(LocalFiles().list(name))
        return [[Path(info.key).relative_to(name).as_posix(), *_content(info)] for info in infos]
    return [name, resolved_revision(config)]


def _task(config: DataConfig, name: str) -> list[Any]:
    digest = hashlib.sha256()
    for record in read_task(name, config.split, config.tasks_folder):
        digest.update(json.dumps(record.raw, sort_keys=True).encode() + b"\n")
    return [digest.hexdigest()]
