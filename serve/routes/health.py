"""`/healthz`: 200 when the model can answer, and only then.

What it takes to answer is the backend's to know."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request

from serve.failures import ApiError
from serve.routes import backend_of

router = APIRouter()

_log = logging.getLogger(__name__)
_PATIENCE_S = 20.0


@router.get("/healthz")
async def healthz(request: Request) -> dict[str, str]:
    """Have the model make a token; anything that keeps it from doing so is a 503."""
    try:
        await asyncio.wait_for(backend_of(request).check_ready(), _PATIENCE_S)
    except Exception as error:
        _log.warning("the model cannot answer: %r", error)
        raise ApiError("The model cannot answer at the moment.", 503, "unavailable", retry_after_s=5) from None
    return {"status": "ok"}
