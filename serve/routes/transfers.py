"""What uploads and downloads have in common: a tenant's turns, threads of their own, and files of this machine.

What is sent, and where it is kept, is left to the routes."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from starlette.requests import Request

from serve.failures import ApiError

Result = TypeVar("Result")
_THREADS = 32
_PREFIX = "ot-ray-upload-"
_ABANDONED_S = 24 * 3600
_threads: RunVar[CapacityLimiter] = RunVar("serve.routes.transfers")


async def in_thread(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function that waits for a disk or the store; however many do, other requests find threads."""
    limiter = _threads.get(None)
    if limiter is None:
        limiter = CapacityLimiter(_THREADS)
        _threads.set(limiter)
    return await to_thread.run_sync(function, *arguments, limiter=limiter)


@contextmanager
def turn(request: Request, tenant_id: str, most: int) -> Iterator[None]:
    """Room for one more upload of a tenant on this replica: each holds a file on this machine's disk.

    Raises:
        ApiError: 429, the tenant has `most` under way.
    """
    # Only the event loop's thread counts.
    under_way: Counter[str] = getattr(request.app.state, "uploads", None) or Counter()
    request.app.state.uploads = under_way
    if under_way[tenant_id] >= most:
        raise ApiError(
            f"{most} uploads are under way already; wait until one is done.", 429, "rate_limit_exceeded", None, 5
        )
    under_way[tenant_id] += 1
    try:
        yield
    finally:
        under_way[tenant_id] -= 1
        if not under_way[tenant_id]:
            del under_way[tenant_id]


def spool(folder: str | None) -> IO[bytes]:
    """A file that vanishes when it is closed; what processes that were killed have left is removed.

    Args:
        folder: where it lies; None takes the system's folder for temporary files.
    """
    place = folder or tempfile.gettempdir()
    os.makedirs(place, exist_ok=True)
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < time.time() - _ABANDONED_S:
                        os.unlink(entry.path)
    return tempfile.NamedTemporaryFile(prefix=_PREFIX, dir=place)
