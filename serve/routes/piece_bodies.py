"""The body of one PUT: where it belongs in its file, and its bytes on this machine's disk, as far as they come.

Keeping them is left to pieces.py."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ot_ray.store.partial import disk_errors
from serve.failures import ApiError
from serve.routes.transfers import in_thread, spool
from serve.wire.offsite import SMALLEST_PIECE
from serve.wire.paging import shown

_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)")


@dataclass(frozen=True)
class Piece:
    """Which bytes of a file a body holds."""

    start: int
    size: int


class OffsetError(ApiError):
    """409: a piece begins elsewhere than the file ends so far."""

    def __init__(self, name: str, offset: int) -> None:
        super().__init__(f"{name} has {offset} bytes so far; go on from there.", 409, "wrong_offset")
        self.name, self.offset = name, offset

    @property
    def headers(self) -> dict[str, str]:
        return {**super().headers, "upload-offset": str(self.offset)}

    def __reduce__(self) -> tuple[type[OffsetError], tuple[str, int]]:
        return OffsetError, (self.name, self.offset)


def placed(headers: Mapping[str, str], total: int, most: int) -> Piece:
    """Where a body belongs in a file of `total` bytes; known, and refused, before any of it is read.

    Raises:
        ApiError: the headers don't fit the file, or the body is larger than `most` or needlessly small.
    """
    given, length = headers.get("content-range"), headers.get("content-length")
    start, size = (0, total) if given is None else _parsed(given, total)
    if length is not None and length != str(size):
        raise ApiError(f"Content-Length is {shown(length)}, but {size} bytes are expected.", param="content-length")
    if size > most:
        raise ApiError(f"A piece has at most {most} bytes; send the file in several, with Content-Range.", 413)
    if size < SMALLEST_PIECE and start + size < total:
        raise ApiError(
            f"A piece has at least {SMALLEST_PIECE} bytes, unless it is a file's last.", param="content-range"
        )
    return Piece(start, size)


def _parsed(given: str, total: int) -> tuple[int, int]:
    match = _RANGE.fullmatch(given.strip())
    if match is None or int(match[2]) < int(match[1]):
        raise ApiError("Content-Range must be `bytes first-last/total`.", param="content-range")
    if match[3] not in ("*", str(total)) or int(match[2]) >= total:
        raise ApiError(f"Content-Range does not fit the {total} bytes that were announced.", param="content-range")
    return int(match[1]), int(match[2]) - int(match[1]) + 1


@asynccontextmanager
async def body_of(
    request: Request, piece: Piece, folder: str | None = None
) -> AsyncIterator[tuple[Path, int, Exception | None]]:
    """A file with what came of a body, how many bytes that is, and the error to raise if it broke off.

    What came of a broken body is good as far as it goes.

    Args:
        folder: where the file lies; None takes the system's folder for temporary files.

    Raises:
        ApiError: the body has more bytes than were stated.
    """
    came, broken = 0, None
    with disk_errors("cannot keep a piece"), await in_thread(spool, folder) as file:
        try:
            async for data in request.stream():
                came += len(data)
                if came > piece.size:
                    raise ApiError(f"The body has more than the {piece.size} bytes that were stated.")
                await in_thread(file.write, data)
        except ClientDisconnect:
            pass
        except HTTPException as error:
            broken = error
        if came < piece.size and broken is None:
            broken = ApiError(f"The connection broke after {came} of {piece.size} bytes; ask how far it is, and go on.")
        await in_thread(file.flush)
        yield Path(file.name), came, broken
