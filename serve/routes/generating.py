"""What completions and chats have in common over HTTP: who may ask which model, and answers as streams of events.

What an event holds is each resource's own."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ot_ray.artifacts import parse_model_name
from ot_ray.errors import ArtifactError
from serve.engine.backend import AnyChunk
from serve.failures import api_error, model_not_found
from serve.routes.identity import Identity
from serve.service import Service
from serve.wire.base import Usage

_log = logging.getLogger(__name__)


def check_model(service: Service, identity: Identity, name: str) -> None:
    """Refuse a model that is another tenant's as one that does not exist, before anybody is asked about it.

    Raises:
        ApiError: 404.
    """
    if service.catalogue is None or name == service.settings.model.name:
        return
    try:
        parts = parse_model_name(name)
    except ArtifactError:
        raise model_not_found(name) from None
    if (parts.model, parts.tenant) != (service.settings.model.name, identity.tenant):
        raise model_not_found(name)


class EventStream(StreamingResponse):
    """Server-sent events; when the client goes away, what makes them is closed at once."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def stream(
    chunks: AsyncGenerator[AnyChunk, None],
    answer_id: str,
    lay_out: Callable[[AnyChunk], Sequence[BaseModel]],
    last: Callable[[Usage], BaseModel] | None,
) -> Response:
    """Answer with events, once the first chunk is there: a refusal still has its own status.

    Args:
        lay_out: the events of a chunk.
        last: the event with the usage; None where none is wanted.
    """
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(_events(first, chunks, answer_id, lay_out, last))


async def _events(
    first: AnyChunk,
    rest: AsyncGenerator[AnyChunk, None],
    answer_id: str,
    lay_out: Callable[[AnyChunk], Sequence[BaseModel]],
    last: Callable[[Usage], BaseModel] | None,
) -> AsyncGenerator[str, None]:
    hidden = {"usage"} if last is None else None

    def events(chunk: AnyChunk) -> str:
        return "".join(_event(shown.model_dump(exclude=hidden)) for shown in lay_out(chunk))

    try:
        async with aclosing(rest):
            yield events(first)
            usage = first.usage
            async for chunk in rest:
                yield events(chunk)
                usage = chunk.usage
        if last is not None and usage is not None:
            yield _event(last(usage).model_dump())
        yield "data: [DONE]\n\n"
    except Exception as error:
        told = api_error(error)
        if told.status == 500:
            _log.error("the stream %s failed", answer_id, exc_info=error)
        yield _event(told.body)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
