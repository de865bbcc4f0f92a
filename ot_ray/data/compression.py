"""Compressed files as streams of plain bytes.

A stream that ends early or is damaged is an error, never a short file."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING, BinaryIO, cast

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_COMPRESSED = 1 << 16
_PLAIN = 1 << 18


class BrokenStreamError(OSError):
    """The compressed bytes are cut off or damaged. Internal: readers say in which file and where."""


def decompressed(file: BinaryIO, compression: str | None) -> BinaryIO:
    """The plain bytes of `file`; closing the result closes it too.

    Args:
        compression: `gzip`, `zstd`, or None for a file that is plain already.

    Raises:
        BrokenStreamError: while reading, where the compressed bytes end early or are damaged.
    """
    if compression is None:
        return file
    raw = _Gzip(file) if compression == "gzip" else _Zstd(file)
    return cast(BinaryIO, io.BufferedReader(raw, _PLAIN))


class _Decompressing(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._some(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _some(self, size: int) -> bytes:
        """At least one and at most `size` plain bytes; none at the end."""
        raise NotImplementedError


class _Gzip(_Decompressing):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._plain = gzip.GzipFile(fileobj=file, mode="rb")

    def _some(self, size: int) -> bytes:
        try:
            return self._plain.read(size)
        except EOFError:
            raise BrokenStreamError("the gzip data ends early") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise BrokenStreamError(f"the gzip data is damaged ({error})") from None


class _Zstd(_Decompressing):
    """Frame by frame, because zstandard's own reader takes a frame that is cut off for the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ahead = b""
        self._held = memoryview(b"")

    def _some(self, size: int) -> bytes:
        while not self._held:
            compressed = self._ahead or self._file.read(_COMPRESSED)
            self._ahead = b""
            if not compressed:
                if self._frame is not None:
                    raise BrokenStreamError("the zstd data ends early")
                return b""
            self._held = memoryview(self._decompress(compressed))
        data, self._held = bytes(self._held[:size]), self._held[size:]
        return data

    def _decompress(self, compressed: bytes) -> bytes:
        if self._frame is None:
            # Corpora are often compressed with `zstd --long=31`, beyond the default limit.
            self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            data = self._frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise BrokenStreamError(f"the zstd data is damaged ({error})") from None
        if self._frame.eof:
            self._ahead, self._frame = self._frame.unused_data, None
        return data
