"""Objects of the store as HTTP answers: streamed, with single ranges, ETags and a safe name to save them under.

Who may have which object is asked by the routes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ot_ray.store import Store
from serve.failures import ApiError
from serve.routes.transfers import in_thread

_PIECE = 4 * 2**20
_RANGE = re.compile(r"bytes=(?:([0-9]{1,15})-([0-9]{0,15})|-([0-9]{1,15}))")
_UNSAFE = re.compile(r"[^A-Za-z0-9._ -]")


@dataclass(frozen=True)
class Download:
    """One object to hand out."""

    key: str
    size: int
    """Bytes."""
    sha256: str
    """Of the bytes, in hexadecimal; it is the ETag."""
    filename: str
    """To save it under: any text, since it comes from outside."""
    media_type: str = "application/octet-stream"


async def download(request: Request, store: Store, item: Download) -> Response:
    """Answer GET or HEAD: 200 with the whole, 206 with the range asked for, 304 if the client has it already.

    Several ranges at once are answered with the whole object, as HTTP allows.

    Raises:
        ApiError: 416 for a range beyond the end.
        NotFoundError: the store has no such object.
    """
    headers = {
        "etag": f'"{item.sha256}"',
        "accept-ranges": "bytes",
        "content-disposition": _disposition(item.filename),
        "x-content-type-options": "nosniff",
        "cache-control": "private, no-cache",
    }
    if _matches(request.headers.get("if-none-match", ""), item.sha256):
        return Response(status_code=304, headers=headers)
    asked = _asked(request, item)
    start, end = asked or (0, item.size)
    if asked:
        headers["content-range"] = f"bytes {start}-{end - 1}/{item.size}"
    headers["content-length"] = str(end - start)
    status = 206 if asked else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=item.media_type)
    # The first piece is read before anything is sent, so that a failure still has its own status.
    first = await _read(store, item.key, start, end)
    return StreamingResponse(_pieces(store, item.key, first, start, end), status, headers, item.media_type)


async def _pieces(store: Store, key: str, first: bytes, start: int, end: int) -> AsyncIterator[bytes]:
    piece = first
    while piece:
        yield piece
        start += len(piece)
        piece = await _read(store, key, start, end) if start < end else b""


async def _read(store: Store, key: str, start: int, end: int) -> bytes:
    return await in_thread(store.read_range, key, start, min(start + _PIECE, end))


def _asked(request: Request, item: Download) -> tuple[int, int] | None:
    """The range to send, from its first byte up to, not including, its end; None for the whole."""
    given = request.headers.get("range", "")
    condition = request.headers.get("if-range")
    found = _RANGE.fullmatch(given.replace(" ", ""))
    # A range that is not understood, or of another version of the object, is answered with the whole.
    if not found or (condition is not None and condition.strip() != f'"{item.sha256}"'):
        return None
    first, last, suffix = found.groups()
    if suffix is not None:
        start, end = max(0, item.size - int(suffix)), item.size
    else:
        start, end = int(first), min(int(last) + 1, item.size) if last else item.size
        if last and int(last) < start:
            return None
    if start >= item.size:
        raise RangeError(item.size)
    return start, end


class RangeError(ApiError):
    """416: the range asked for begins beyond the end."""

    def __init__(self, size: int) -> None:
        super().__init__(f"The range begins beyond the end of the {size} bytes.", 416)
        self.size = size

    @property
    def headers(self) -> dict[str, str]:
        return {**super().headers, "content-range": f"bytes */{self.size}"}

    def __reduce__(self) -> tuple[type[RangeError], tuple[int]]:
        return RangeError, (self.size,)


def _matches(if_none_match: str, sha256: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or f'"{sha256}"' in tags


def _disposition(filename: str) -> str:
    """RFC 6266: a plain name for old clients, and the whole one in UTF-8; nothing in it can end the header."""
    plain = _UNSAFE.sub("_", filename).strip(". ") or "file"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='', errors='replace')}"
