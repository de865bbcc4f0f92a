"""Which files a source has, and how their bytes are opened: this machine's folders, or whatever a `Files` reaches.

What the bytes mean is left to `readers`; S3 itself to the caller that hands in a `Files`."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from ot_ray.errors import ConfigError, DataError

S3 = "s3://"
SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}


@dataclass(frozen=True)
class FileInfo:
    """One file as its keeper lists it."""

    key: str
    """What `Files.open` takes."""

    size: int
    """Bytes, as stored."""

    etag: str | None = None
    """What changes with the content (a checksum, an S3 ETag), or None where none is kept."""


class Files(Protocol):
    """Reads files that lie elsewhere. Must be picklable: worker processes open files by themselves."""

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """The file whose key is `prefix`, or all files in the folder `prefix`; the empty prefix lists all."""
        ...

    def open(self, key: str) -> BinaryIO:
        """A readable, seekable stream of bytes. Raises FileNotFoundError, or another error of the keeper."""
        ...


class LocalFiles:
    """The files of this machine; keys are paths."""

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """The file, or the files below the folder without hidden ones and what lies in hidden folders."""
        path = Path(prefix)
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for entry in found:
            if entry.is_file() and not _hidden(entry.relative_to(path).parts):
                yield FileInfo(str(entry), entry.stat().st_size)

    def open(self, key: str) -> BinaryIO:
        """The file, for reading in binary."""
        return Path(key).open("rb")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, with all that reading it takes."""

    name: str
    """Path or address, for messages; never holds an address's query."""

    info: FileInfo

    kind: str
    """`text`, `jsonl` or `parquet`."""

    compression: str | None
    """`gzip`, `zstd` or None."""


def bucket_address(source: str) -> str:
    """The store's address whose keys are the bucket's: `s3://bucket/a/*.jsonl?x=1` gives `s3://bucket?x=1`."""
    parts = urlsplit(source)
    return f"{S3}{parts.netloc}" + (f"?{parts.query}" if parts.query else "")


def find_files(source: str, kind: str, files: Files | None = None) -> list[SourceFile]:
    """The files of a source that is no Hugging Face dataset, sorted by name.

    Args:
        source: a file, a folder, a glob, or one of these in a bucket, `s3://bucket/folder/*.jsonl?...`.
        kind: `text`, `jsonl`, `parquet`, or `auto` to go by each file's suffix.
        files: opens the files of `s3://` sources; its keys are the bucket's.

    Raises:
        DataError: there is none (the nearest names are suggested), or a format cannot be told.
        ConfigError: an `s3://` source without `files`.
    """
    if source.startswith(S3):
        return _in_bucket(source, kind, files)
    return [_described(str(path), _info(path), kind) for path in _local(source, kind)]


def _local(source: str, kind: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        listed = [Path(info.key) for info in LocalFiles().list(str(path))]
        return _chosen(str(path), listed, kind)
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"{source}: no file matches; check the pattern")
        return found
    raise _not_found(path)


def _in_bucket(source: str, kind: str, files: Files | None) -> list[SourceFile]:
    if files is None:
        raise ConfigError(f"data.source is in a bucket ({_place(source)}), which needs `files` to open it; pass files=")
    bucket, path = urlsplit(source).netloc, unquote(urlsplit(source).path).strip("/")
    pattern = path.split("/")
    fixed = next((n for n, part in enumerate(pattern) if glob.has_magic(part)), len(pattern))
    listed = sorted(files.list("/".join(pattern[:fixed])), key=lambda info: info.key)
    if fixed < len(pattern):
        found = [info for info in listed if _matches(info.key.split("/"), pattern)]
    elif [info.key for info in listed] == [path]:
        found = listed
    else:
        below = len(pattern) if path else 0
        visible = {info.key: info for info in listed if not _hidden(info.key.split("/")[below:])}
        found = [visible[str(key)] for key in _chosen(_place(source), [Path(key) for key in visible], kind)]
    if not found:
        raise DataError(f"{_place(source)}: no file matches; check the pattern")
    return [_described(f"{S3}{bucket}/{info.key}", info, kind) for info in found]


def _matches(key: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a key's segments match a pattern's, as `glob` matches paths: `*` stays within one segment, and what is
    hidden is met only by a segment that begins with a dot itself."""
    if not pattern:
        return not key
    if pattern[0] == "**":
        return any(_matches(key[n:], pattern[1:]) for n in range(len(key)) if not _hidden(key[:n]))
    if not key or (_hidden(key[:1]) and not _hidden(pattern[:1])):
        return False
    return fnmatchcase(key[0], pattern[0]) and _matches(key[1:], pattern[1:])


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _chosen(folder: str, paths: Sequence[Path], kind: str) -> list[Path]:
    """The files of a folder that are of the kind."""
    suffixes = tuple(_FORMATS) if kind == "auto" else SUFFIXES[kind]
    found = [path for path in paths if _suffix(path) in suffixes]
    if not found:
        raise DataError(f"{folder}: the folder holds no {', '.join(suffixes)} file; name the file itself")
    return found


def _described(name: str, info: FileInfo, kind: str) -> SourceFile:
    path = Path(info.key)
    compression = COMPRESSIONS.get(path.suffix.lower())
    found = _FORMATS.get(_suffix(path)) if kind == "auto" else kind
    if found is None:
        raise DataError(
            f"{name}: cannot tell the format by the suffix {path.suffix!r} (known: {', '.join(_FORMATS)}, "
            "also with .gz or .zst behind it); set data.format"
        )
    if found == "parquet" and compression:
        raise DataError(f"{name}: Parquet compresses by itself and is not read through {path.suffix}; unpack the file")
    return SourceFile(name, info, found, compression)


def _suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def _info(path: Path) -> FileInfo:
    try:
        return FileInfo(str(path), path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _place(source: str) -> str:
    return source.partition("?")[0]


def _not_found(path: Path) -> DataError:
    if not path.parent.is_dir():
        return DataError(f"{path}: there is no folder {path.parent}; pass an existing file, folder or glob")
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, sorted(names), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "pass an existing file, folder or glob"
    return DataError(f"{path}: no such file; {hint}")
