"""Training text and images that lie in a bucket, for the data room, which knows nothing of stores.

What the bytes mean is data's affair; how a store is reached is store's."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

from ot_ray.data import DataConfig
from ot_ray.data.files import S3, FileInfo, Files, bucket_address
from ot_ray.store import PatientStore, Store, open_store

BLOCK = 8 << 20
"""Bytes a request for text, which is read from end to end."""

HEADER = 16 << 10
"""Bytes a request for an image whose header alone is looked at; what is read whole is one request anyway."""


def files_of(config: DataConfig, patience_s: float = 0.0) -> Files | None:
    """What opens a source's files where they lie in a bucket; None for files of this machine and data sets.

    Args:
        patience_s: seconds that a read waits for a store that does not answer.
    """
    return _bucket(config.source, patience_s, BLOCK)


def image_files(source: str, patience_s: float = 0.0) -> Files | None:
    """What opens the images of a source as `files_of` opens text: None where it is no `s3://` address."""
    return _bucket(source, patience_s, HEADER)


def _bucket(source: str, patience_s: float, block: int) -> Files | None:
    if not source.startswith(S3):
        return None
    return StoreFiles(PatientStore(open_store(bucket_address(source)), patience_s), block)


class StoreFiles:
    """A store's objects as files: read by ranges, so that a file of any size takes `block` bytes of memory."""

    def __init__(self, store: Store, block: int = BLOCK) -> None:
        self._store, self._block = store, block

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """The object under the key `prefix`, or all objects in the folder `prefix`."""
        keys = [prefix] if prefix and self._store.exists(prefix) else self._store.list(prefix)
        for key in keys:
            info = self._store.info(key)
            yield FileInfo(key, info.size, info.sha256 or info.etag)

    def open(self, key: str) -> BinaryIO:
        """A buffered, seekable stream. Raises NotFoundError."""
        return io.BufferedReader(_Object(self._store, key, self._store.info(key).size), self._block)


class _Object(io.RawIOBase):
    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size, self._place = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readall(self) -> bytes:
        # The inherited one asks for 8 KiB at a time.
        data = self._store.read_range(self._key, self._place, self._size) if self._place < self._size else b""
        self._place += len(data)
        return data

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
        end = min(self._size, self._place + len(buffer))
        if end <= self._place:
            return 0
        data = self._store.read_range(self._key, self._place, end)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
