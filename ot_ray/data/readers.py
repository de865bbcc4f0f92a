"""Reading one source as a stream: text, JSONL and Parquet files, and Hugging Face datasets.

Which files to read is `documents`' business; what a row means is `examples`'."""

from __future__ import annotations

import codecs
import importlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ot_ray.data.examples import SHAPES, Document, Example, Segment, parse_row, shape_of
from ot_ray.errors import DataError, MissingDependencyError

LONGEST_TEXT = 1 << 20
"""Characters of a plain-text document that are held at once; a longer one is cut at a line's end."""

_BLOCK = 1 << 18
_BYTE_ORDER_MARK = "\ufeff"


def read_text(path: Path, separator: str | None) -> Iterator[Document]:
    """A text file as documents: the whole file, or the parts between separators.

    Raises:
        DataError: the file is empty, not UTF-8 or not readable.
    """
    number = 0
    for text in _parts(_blocks(path), separator):
        if text.strip():
            number += 1
            yield Example((Segment(text, True),), f"{path}, document {number}")
    if not number:
        raise _empty(path)


def read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    """A file of one JSON object a line; blank lines are skipped.

    Raises:
        DataError: the file is empty, not UTF-8 or not readable, or a line is no valid row.
    """
    found = False
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        found = True
        yield parse_row(_json(line, where), text_field, where)
    if not found:
        raise _empty(path)


def read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    """A Parquet file, batch by batch, reading only the columns that make up a document.

    Raises:
        DataError: the file is unreadable, empty or lacks the columns, or a row is no valid document.
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise _missing("pyarrow", f"{path} is a Parquet file") from None
    number = 0
    for row in _parquet_rows(parquet, path, text_field):
        number += 1
        yield parse_row(row, text_field, f"{path}, row {number}")
    if not number:
        raise _empty(path)


def read_hub(name: str, split: str, text_field: str) -> Iterator[Document]:
    """A Hugging Face dataset, streamed: `name`, `owner/name`, `owner/name/config` or a local folder.

    Raises:
        DataError: the dataset, its config or split cannot be loaded, or a row is no valid document.
        MissingDependencyError: datasets is not installed.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise _missing("datasets", f"hub:{name} is a Hugging Face dataset") from None
    source = f"hub:{name}, split {split}"
    number = 0
    for row in _hub_rows(datasets, name, split, source):
        number += 1
        yield parse_row(row, text_field, f"{source}, row {number}")
    if not number:
        raise DataError(f"{source}: the dataset is empty; choose another split")


def _blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    translator = io.IncrementalNewlineDecoder(decoder, translate=True)
    offset, newlines, start = 0, 0, True
    with _opened(path) as file:
        while True:
            block = file.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = translator.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - pending + error.start
                line = 1 + newlines + error.object[: error.start].count(b"\n")
                raise _not_utf8(path, place, line) from None
            yield text.removeprefix(_BYTE_ORDER_MARK) if start else text
            if not block:
                return
            offset, newlines, start = offset + len(block), newlines + block.count(b"\n"), False


def _parts(blocks: Iterable[str], separator: str | None) -> Iterator[str]:
    held = ""
    for block in blocks:
        held += block
        if separator:
            *whole, held = held.split(separator)
            yield from whole
        while len(held) > LONGEST_TEXT:
            cut = held.rfind("\n", 0, LONGEST_TEXT) + 1 or LONGEST_TEXT
            yield held[:cut]
            held = held[cut:]
    yield held


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    offset = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start, number) from None
            offset += len(line)
            text = text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text
            if text.strip():
                yield number, text


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON: {_first_line(error)}") from None


def _parquet_rows(parquet: Any, path: Path, text_field: str) -> Iterator[Mapping[str, Any]]:
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = shape_of(names, text_field)
            if columns is None:
                found = ", ".join(map(repr, names)) or "none"
                raise DataError(f"{path}: the columns are {found}; rows must be {SHAPES}, or set data.text_field")
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable Parquet file: {_first_line(error)}") from None


def _hub_rows(datasets: Any, name: str, split: str, source: str) -> Iterator[Mapping[str, Any]]:
    parts = name.split("/")
    # A path is never a config's name, so a misspelt folder is reported whole.
    local = Path(name).is_dir() or name.startswith(("/", "."))
    path = name if local else "/".join(parts[:2])
    config = None if local else "/".join(parts[2:]) or None
    try:
        yield from datasets.load_dataset(path, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: cannot be loaded: {_first_line(error)}; "
            "check the name (owner/name/config), the split and the network"
        ) from None


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: the file holds no documents; remove it or fill it")


def _not_utf8(path: Path, offset: int, line: int) -> DataError:
    return DataError(f"{path}, line {line}: not UTF-8 at byte {offset}; save the file as UTF-8")


def _missing(package: str, reason: str) -> MissingDependencyError:
    return MissingDependencyError(f"{reason} and needs {package}: pip install 'ot_ray[eval]'")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
