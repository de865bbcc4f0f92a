"""Forms with a file (multipart/form-data), read piece by piece onto this machine's disk while sha256 runs.

What a file is for, and where it is kept, is left to the routes."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from ot_ray.errors import StoreError
from ot_ray.store.partial import disk_errors
from serve.failures import ApiError
from serve.routes.transfers import in_thread, spool
from serve.wire.paging import shown

ROOM = 64 * 1024
"""Bytes of a form beyond its file: boundaries, headers, fields."""

_log = logging.getLogger(__name__)
# What is wrong with a form is told to its sender; a line for each in the log would be the sender's to fill.
_quiet = logging.getLogger(f"{__name__}.parser")
_quiet.setLevel(logging.ERROR)
_BLOCK = 1 << 20
_MOST_PARTS, _MOST_FIELD, _MOST_NAME = 8, 1024, 512
_BOUNDARY = re.compile(rb"[ -~]{0,69}[!-~]")
_PLAIN_ENCODINGS = (b"", b"7bit", b"8bit", b"binary")


@dataclass(frozen=True)
class ReceivedFile:
    """A file that has come in whole; it lies at `path` as long as the form is open."""

    path: Path
    filename: str
    """As the client wrote it: data, never a path."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Form:
    """The fields of a form, by name, and its one file."""

    fields: dict[str, str]
    file: ReceivedFile


@asynccontextmanager
async def received_form(request: Request, max_bytes: int, folder: str | None = None) -> AsyncIterator[Form]:
    """Read a request's form; nothing of it is left on the disk after the block, whatever happens.

    Args:
        max_bytes: largest file.
        folder: where the file lies meanwhile; None takes the system's folder for temporary files.

    Raises:
        ApiError: the body is no such form, is cut off or too large, or the disk is full.
    """
    boundary = _boundary(request.headers.get("content-type", ""))
    with _told():
        file = await in_thread(spool, folder)
    try:
        with _told():
            reader = FormReader(boundary, file, max_bytes)
            async for block in _blocks(request):
                await in_thread(reader.write, block)
            form = await in_thread(reader.finish)
        yield form
    finally:
        file.close()


@contextmanager
def _told() -> Iterator[None]:
    try:
        with disk_errors("cannot keep the upload"):
            yield
    except ClientDisconnect:
        raise ApiError("The upload was cut off before its end.") from None
    except StoreError as error:
        _log.error("%s", error)
        raise ApiError("The server has no room for the upload now; try again.", 503, retry_after_s=30) from None


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    """The body in blocks that are worth a thread each."""
    held, size = [], 0
    async for piece in request.stream():
        held.append(piece)
        size += len(piece)
        if size >= _BLOCK:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data":
        raise ApiError(
            "The request body must be a form with a file: send content-type multipart/form-data with its boundary.", 415
        )
    if not _BOUNDARY.fullmatch(boundary):
        raise ApiError("The content-type's boundary must be 1 to 70 printable characters.")
    return boundary


class FormReader:
    """Takes the bytes of a form as they come; the part `file` goes to a file, the others are kept.

    Args:
        boundary: from the content-type.
        file: where to write, open and empty.
        max_bytes: of the part `file`.
    """

    def __init__(self, boundary: bytes, file: IO[bytes], max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._digest, self._size, self._filename = hashlib.sha256(), 0, None
        self._fields: dict[str, bytearray] = {}
        self._fed = self._taken = self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header = b""
        self._value = b""
        self._field: bytearray | None = None
        self._whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_data,
                "on_part_data": self._take_data,
                "on_end": self._end,
            },
        )
        self._parser.logger = _quiet

    def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            ApiError: they break the form's rules.
        """
        self._fed += len(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ApiError(f"The form is malformed near byte {self._fed}: {shown(str(error))}.") from None
        # Padding, parts without end and what follows the last part are no data; a parser would read them for ever.
        if self._fed - self._taken > ROOM:
            raise ApiError(f"The form holds more than {ROOM} bytes beside its file; send purpose and file alone.")

    def finish(self) -> Form:
        """The form, once all its bytes are there.

        Raises:
            ApiError: it is cut off, or lacks the file.
        """
        if not self._whole:
            raise ApiError("The form is cut off: its last boundary is missing.")
        if self._filename is None:
            raise ApiError("Missing required parameter: 'file'.", code="missing_required_parameter", param="file")
        if not self._size:
            raise ApiError("The file is empty; send one with at least one byte.", code="invalid_file", param="file")
        self._file.flush()
        fields = {name: _text(bytes(value), f"the field {shown(name)}") for name, value in self._fields.items()}
        file = ReceivedFile(Path(self._file.name), self._filename, self._size, self._digest.hexdigest())
        return Form(fields, file)

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise ApiError(f"The form has more than {_MOST_PARTS} parts; send purpose and file alone.")
        self._headers, self._header, self._value, self._field = {}, b"", b"", None

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        name = self._header.lower()
        if name in self._headers:
            raise ApiError(f"A part of the form has the header {shown(name.decode('latin-1'))} twice.")
        self._headers[name] = self._value
        self._header, self._value = b"", b""

    def _begin_data(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise ApiError('A part of the form has no content-disposition: form-data; name="...".')
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() not in _PLAIN_ENCODINGS:
            raise ApiError("A part of the form is encoded; send its bytes as they are.")
        name = _text(options[b"name"], "the name of a part")
        if name in self._fields or (name == "file" and self._filename is not None):
            raise ApiError(f"The form holds '{shown(name)}' twice; send it once.", param=shown(name))
        if name == "file":
            self._filename = _filename(options.get(b"filename"))
        elif b"filename" in options:
            raise ApiError(f"'{shown(name)}' is a file; send 'file' alone as one.", param=shown(name))
        else:
            self._field = self._fields[name] = bytearray()

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        count = end - start
        if self._field is not None:
            self._field += data[start:end]
            if len(self._field) > _MOST_FIELD:
                raise ApiError(f"A field of the form is longer than {_MOST_FIELD} bytes.")
            return
        self._size += count
        self._taken += count
        if self._size > self._max_bytes:
            raise ApiError(f"The file is larger than {self._max_bytes} bytes; send a smaller one.", 413, param="file")
        piece = data[start:end]
        self._digest.update(piece)
        self._file.write(piece)

    def _end(self) -> None:
        self._whole = True


def _filename(given: bytes | None) -> str:
    if not given:
        raise ApiError("'file' has no filename; send it as a file, not as text.", param="file")
    if len(given) > _MOST_NAME:
        raise ApiError(f"The filename is longer than {_MOST_NAME} bytes; shorten it.", param="file")
    name = _text(given, "the filename")
    if "\0" in name:
        raise ApiError("The filename holds a NUL character; leave it out.", param="file")
    return name


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(f"In the form, {what} is not UTF-8.") from None
