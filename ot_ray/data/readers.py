"""One file or dataset as a stream of raw records that can start anywhere: text, JSONL, Parquet, Hugging Face.

Which files to read is `files`' business; what a row means is `examples`'."""

from __future__ import annotations

import codecs
import importlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ot_ray.data.compression import BrokenStreamError, decompressed
from ot_ray.data.examples import SHAPES, Document, Example, Segment, parse_row, shape_of
from ot_ray.data.files import Files, SourceFile
from ot_ray.errors import DataError, MissingDependencyError, OTRayError

LONGEST_TEXT = 1 << 20
"""Characters of a plain-text document that are held at once; a longer one is cut at a line's end."""

_BLOCK = 1 << 18
_PARQUET_BATCH = 256
_BYTE_ORDER_MARK = "\ufeff"


class Place(NamedTuple):
    """Where a record begins in its file."""

    number: int = 1
    """Of the line, row or part, from 1."""

    offset: int = 0
    """Byte of the plain content; kept for lines only."""


BEGINNING = Place()


class Record(NamedTuple):
    """One document before it is parsed, so that whoever does not want it does not pay for it."""

    place: Place
    raw: bytes | str | Mapping[str, Any]

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        if isinstance(self.raw, Mapping):
            return sum(len(value) if isinstance(value, str) else 64 for value in self.raw.values())
        return len(self.raw)


def read_records(
    file: SourceFile, files: Files, text_field: str, separator: str | None, start: Place, longest: int
) -> Iterator[Record]:
    """The records of a file from `start`, which is the place of a record read before, or `BEGINNING`.

    Args:
        separator: what divides a text file into documents.
        longest: characters of a text that make one record; a longer one is cut at a line's end.

    Raises:
        DataError: the file is empty, gone, damaged, not readable or not UTF-8, or lacks the columns.
        MissingDependencyError: pyarrow is not installed.
    """
    found = start != BEGINNING
    if file.kind == "text":
        records = _texts(file, files, separator, longest, start)
    elif file.kind == "jsonl":
        records = _lines(file, files, start)
    else:
        records = _rows(file, files, text_field, start)
    for record in records:
        found = True
        yield record
    if not found:
        raise DataError(f"{file.name}: the file holds no documents; remove it or fill it")


def parse_record(record: Record, file: SourceFile, text_field: str) -> Document:
    """The document that a record of this file holds.

    Raises:
        DataError: the record is no valid document; the message names file and line.
    """
    if isinstance(record.raw, str):
        return Example((Segment(record.raw, True),), f"{file.name}, document {record.place.number}")
    if isinstance(record.raw, Mapping):
        return parse_row(record.raw, text_field, f"{file.name}, row {record.place.number}")
    where = f"{file.name}, line {record.place.number}"
    try:
        line = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, record.place.offset + error.start, record.place.number) from None
    return parse_row(_json(line.removeprefix(_BYTE_ORDER_MARK), where), text_field, where)


def read_hub(name: str, split: str, start: Place, revision: str | None = None) -> Iterator[Record]:
    """The rows of a Hugging Face dataset, streamed: `name`, `owner/name`, `owner/name/config` or a folder.

    Args:
        revision: a branch, tag or commit of a dataset on the hub; unset, its main branch.

    Raises:
        DataError: the dataset, its config or split cannot be loaded, or is empty.
        MissingDependencyError: datasets is not installed.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise _missing("datasets", f"hub:{name} is a Hugging Face dataset") from None
    source = f"hub:{name}, split {split}"
    number = start.number - 1
    for row in _hub_rows(datasets, name, split, source, number, revision):
        number += 1
        yield Record(Place(number), row)
    if not number:
        raise DataError(f"{source}: the dataset is empty; choose another split")


def _texts(file: SourceFile, files: Files, separator: str | None, longest: int, start: Place) -> Iterator[Record]:
    # What a text's part is depends on all before it, so a later start reads, and lets go, what lies before.
    number = 0
    for text in _parts(_blocks(file, files), separator, longest):
        if text.strip():
            number += 1
            if number >= start.number:
                yield Record(Place(number), text)


def _blocks(file: SourceFile, files: Files) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    translator = io.IncrementalNewlineDecoder(decoder, translate=True)
    offset, newlines, start = 0, 0, True
    with _opened(file, files) as stream:
        while True:
            with _failing_at(file, newlines):
                block = stream.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = translator.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - pending + error.start
                line = 1 + newlines + error.object[: error.start].count(b"\n")
                raise _not_utf8(file, place, line) from None
            yield text.removeprefix(_BYTE_ORDER_MARK) if start else text
            if not block:
                return
            offset, newlines, start = offset + len(block), newlines + block.count(b"\n"), False


def _parts(blocks: Iterable[str], separator: str | None, longest: int) -> Iterator[str]:
    held, ahead = "", len(separator) - 1 if separator else 0
    for block in blocks:
        held += block
        if separator:
            *whole, held = held.split(separator)
            for text in whole:
                *pieces, last = _cut(text, longest)
                yield from pieces
                yield last
        # The end may be the beginning of a separator, which a cut would hide.
        end = max(0, len(held) - ahead)
        *pieces, rest = _cut(held[:end], longest)
        yield from pieces
        held = rest + held[end:]
    yield from _cut(held, longest)


def _cut(text: str, longest: int) -> Iterator[str]:
    """The text in pieces of at most `longest` characters, which end where a line ends if one does."""
    start = 0
    while len(text) - start > longest:
        stop = text.rfind("\n", start, start + longest) + 1 or start + longest
        yield text[start:stop]
        start = stop
    yield text[start:]


def _lines(file: SourceFile, files: Files, start: Place) -> Iterator[Record]:
    number, offset = start
    with _opened(file, files) as stream:
        if file.compression is None:
            with _failing_at(file, number - 1):
                stream.seek(offset)
        else:
            number, offset = 1, 0
        while True:
            with _failing_at(file, number - 1):
                line = stream.readline()
            if not line:
                return
            blank = not line.strip() or (number == 1 and not line.removeprefix(codecs.BOM_UTF8).strip())
            if not blank and number >= start.number:
                yield Record(Place(number, offset), line)
            number, offset = number + 1, offset + len(line)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON: {_first_line(error)}") from None


def _rows(file: SourceFile, files: Files, text_field: str, start: Place) -> Iterator[Record]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise _missing("pyarrow", f"{file.name} is a Parquet file") from None
    with _opened(file, files) as stream, _readable_parquet(file), parquet.ParquetFile(stream) as table:
        names = table.schema_arrow.names
        columns = shape_of(names, text_field)
        if columns is None:
            found = ", ".join(map(repr, names)) or "none"
            raise DataError(f"{file.name}: the columns are {found}; rows must be {SHAPES}, or set data.text_field")
        before, groups = 0, []
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if groups or before + rows >= start.number:
                groups.append(group)
            else:
                before += rows
        batches = table.iter_batches(batch_size=_PARQUET_BATCH, row_groups=groups, columns=list(columns))
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, before + 1):
            if number >= start.number:
                yield Record(Place(number), row)


@contextmanager
def _readable_parquet(file: SourceFile) -> Iterator[None]:
    try:
        yield
    except OTRayError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name}: not a readable Parquet file: {_first_line(error)}") from None


def _hub_rows(
    datasets: Any, name: str, split: str, source: str, skip: int, revision: str | None
) -> Iterator[Mapping[str, Any]]:
    parts = name.split("/")
    # A path is never a config's name, so a misspelt folder is reported whole.
    local = Path(name).is_dir() or name.startswith(("/", "."))
    path = name if local else "/".join(parts[:2])
    config = None if local else "/".join(parts[2:]) or None
    try:
        rows = datasets.load_dataset(path, config, split=split, revision=None if local else revision, streaming=True)
        yield from rows.skip(skip) if skip else rows
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: cannot be loaded: {_first_line(error)}; "
            "check the name (owner/name/config), the split and the network"
        ) from None


def _opened(file: SourceFile, files: Files) -> BinaryIO:
    with _failing_at(file, 0):
        return decompressed(files.open(file.info.key), file.compression)


@contextmanager
def _failing_at(file: SourceFile, line: int) -> Iterator[None]:
    """Say in which file, and after which line, reading failed."""
    where = f"{file.name}, after line {line}" if line else file.name
    try:
        yield
    except BrokenStreamError as error:
        raise DataError(f"{where}: {error}; copy the file again") from None
    except FileNotFoundError:
        raise DataError(f"{where}: the file is no longer there; put it back or start a new run") from None
    except OSError as error:
        if isinstance(error, OTRayError):
            raise
        raise DataError(f"{where}: cannot be read: {error.strerror or _first_line(error)}") from None


def _not_utf8(file: SourceFile, offset: int, line: int) -> DataError:
    return DataError(f"{file.name}, line {line}: not UTF-8 at byte {offset}; save the file as UTF-8")


def _missing(package: str, reason: str) -> MissingDependencyError:
    return MissingDependencyError(f"{reason} and needs {package}: pip install 'ot_ray[eval]'")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
