"""`/healthz`: 200 when the model can answer, and only then.

What it takes to answer is the backend's to know."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import APIRouter, Request

from serve.engine.backend import Backend
from serve.failures import ApiError
from serve.routes import backend_of

router = APIRouter()

_log = logging.getLogger(__name__)
_PATIENCE_S = 20.0
_FRESH_S = 1.0


@router.get("/healthz", summary="Check that the model answers")
async def healthz(request: Request) -> dict[str, str]:
    """Have the model make a token; anything that keeps it from doing so is a 503."""
    state = request.app.state
    if getattr(state, "health", None) is None:
        state.health = Health(backend_of(request))
    if not await state.health.good():
        raise ApiError("The model cannot answer at the moment.", 503, "unavailable", retry_after_s=5)
    return {"status": "ok"}


class Health:
    """Whether a backend can answer, asked once at a time and once a second: who asks needs no key.

    Args:
        fresh_s: seconds for which a verdict holds.
    """

    def __init__(self, backend: Backend, fresh_s: float = _FRESH_S) -> None:
        self._backend, self._fresh_s = backend, fresh_s
        self._verdict, self._until = False, -1.0
        self._asking: asyncio.Task[bool] | None = None

    async def good(self) -> bool:
        """The last verdict, or a new one if that is too old."""
        if time.monotonic() < self._until:
            return self._verdict
        loop = asyncio.get_running_loop()
        if self._asking is None or self._asking.done() or self._asking.get_loop() is not loop:
            self._asking = loop.create_task(self._ask())
        # Who goes away leaves the question to the others.
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bool:
        try:
            await asyncio.wait_for(self._backend.check_ready(), _PATIENCE_S)
            self._verdict = True
        except Exception as error:
            _log.warning("the model cannot answer: %r", error)
            self._verdict = False
        self._until = time.monotonic() + self._fresh_s
        return self._verdict
