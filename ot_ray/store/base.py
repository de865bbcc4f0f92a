"""What a store promises, and which keys it takes.

Where the bytes lie is left to `local` and `s3`; whole folders are left to `transfer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ot_ray.errors import StoreError

# Names of files that are still being written; no key may use them.
TEMPORARY = ".part-"

Advance = Callable[[int], None]  # called with the number of bytes moved since the last call


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its key, its size in bytes, its sha256 in hexadecimal.

    `sha256` is None where the store keeps none: objects in a folder, objects that others put on S3. `etag` is
    what S3 says of the bytes, another text for other bytes; None in a folder.
    """

    key: str
    size: int
    sha256: str | None
    etag: str | None = field(default=None, compare=False)


class Store(Protocol):
    """Bytes under keys; picklable, and rebuilt anywhere by `open_store(store.url)`.

    A key is a relative path with `/` between its segments. A prefix names a folder of keys: `a/b` covers
    `a/b/c` and never `a/bc`; the empty prefix covers the store.

    Every method raises StoreError for a key it does not take or an answer it cannot use, and
    StoreUnavailableError when the store does not answer after retries.
    """

    url: str

    def read(self, key: str) -> bytes:
        """The whole object, in memory. Raises NotFoundError."""
        ...

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` up to, not including, `end`; cut at the object's end as a slice is.

        Raises NotFoundError.
        """
        ...

    def info(self, key: str) -> ObjectInfo:
        """Size and, where kept, sha256, without reading the object. Raises NotFoundError."""
        ...

    def exists(self, key: str) -> bool:
        """Whether an object stands under this key."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Put an object in place of any older one; readers see the old or the new, never a mixture.

        Raises StoreFullError, with the old object left as it was.
        """
        ...

    def create(self, key: str, data: bytes) -> None:
        """Put an object where none stands; of several racing creators exactly one succeeds.

        Raises AlreadyExistsError, StoreFullError.
        """
        ...

    def upload(self, path: str | Path, key: str, progress: Advance | None = None) -> ObjectInfo:
        """Put a file of any size in place of any older object, without holding it in memory.

        Raises NotFoundError (no such file), StoreFullError.
        """
        ...

    def download(self, key: str, path: str | Path, sha256: str | None = None, progress: Advance | None = None) -> None:
        """Write an object to a file, which appears under its name only when complete and verified.

        Args:
            sha256: what the object must hash to, in hexadecimal; without it the store's own record counts.

        Raises:
            NotFoundError: no such object.
            StoreError: the sha256 differs; no file is left.
            StoreFullError: no room for the file; no part of it is left.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """All keys under a prefix, sorted by code point."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; an object that is not there is no error."""
        ...

    def delete_prefix(self, prefix: str) -> None:
        """Remove all objects under a prefix; the empty prefix is refused."""
        ...


def check_key(key: str) -> str:
    """The key itself, where a store takes it.

    Raises:
        StoreError: the key is empty or absolute, holds `..`, `.`, an empty segment, a backslash, a control
            character or no valid text, or a name reserved for files that are being written.
    """
    problem = _problem(key)
    if problem:
        raise StoreError(f"key {key!r} {problem}; use a relative path such as models/opt/manifest.json")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix without its last slash, where a store takes it; the empty prefix is valid.

    Raises:
        StoreError: the prefix breaks a rule of `check_key`.
    """
    return check_key(prefix.removesuffix("/")) if prefix else ""


def check_deletable(prefix: str) -> str:
    """A prefix as `check_prefix` gives it, unless it names the whole store.

    Raises:
        StoreError: the prefix is empty or breaks a rule of `check_key`.
    """
    if not prefix:
        raise StoreError("the empty prefix names the whole store; delete folder by folder")
    return check_prefix(prefix)


def check_range(key: str, start: int, end: int) -> None:
    """Raises StoreError unless 0 <= start <= end."""
    if not 0 <= start <= end:
        raise StoreError(f"bytes {start} to {end} of {key!r} are no range; use 0 <= start <= end")


def join_key(prefix: str, name: str) -> str:
    """The key of `name` under a prefix that may be empty."""
    return f"{prefix}/{name}" if prefix else name


def _problem(key: str) -> str | None:
    if not key:
        return "is empty"
    if key.startswith("/"):
        return "is absolute"
    if "\\" in key:
        return "holds a backslash"
    if any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in key):
        return "holds a control character or bytes that are no text"
    for segment in key.split("/"):
        if segment == "":
            return "holds an empty segment"
        if segment in (".", ".."):
            return f"holds the segment {segment!r}"
        if segment.startswith(TEMPORARY):
            return f"holds {TEMPORARY!r}, which is reserved for files that are being written"
    return None
