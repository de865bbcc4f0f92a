"""`/v1/completions`: whole answers, and streams of server-sent events.

Generation is the backend's; this module only lays its chunks out."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.engine.backend import Backend
from serve.engine.generation import Chunk
from serve.failures import api_error
from serve.routes import backend_of
from serve.wire.completions import Choice, Completion, CompletionRequest, Logprobs, Usage

router = APIRouter(prefix="/v1")

_log = logging.getLogger(__name__)


@router.post("/completions")
async def complete(request: Request, body: CompletionRequest) -> Response:
    """Continue one or more prompts."""
    answer_id = f"cmpl-{secrets.token_hex(16)}"
    backend = backend_of(request)
    if body.stream:
        return await _stream(backend, body, answer_id)
    return JSONResponse((await _whole(backend, body, answer_id)).model_dump())


async def _whole(backend: Backend, body: CompletionRequest, answer_id: str) -> Completion:
    choices: dict[int, Choice] = {}
    usage = None
    async with aclosing(backend.complete(body)) as chunks:
        async for chunk in chunks:
            piece, usage = chunk.choice, chunk.usage
            choice = choices.setdefault(piece.index, Choice(index=piece.index))
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason
            if piece.logprobs is not None:
                choice.logprobs = choice.logprobs or Logprobs()
                choice.logprobs.extend(piece.logprobs)
    return Completion(id=answer_id, model=body.model, choices=list(choices.values()), usage=usage)


async def _stream(backend: Backend, body: CompletionRequest, answer_id: str) -> Response:
    chunks = backend.complete(body)
    try:
        # Nothing is sent before the first chunk is there, so that a refusal still has its own status.
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(_events(first, chunks, body, answer_id))


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


async def _events(
    first: Chunk, rest: AsyncGenerator[Chunk, None], body: CompletionRequest, answer_id: str
) -> AsyncGenerator[str, None]:
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    template = Completion(id=answer_id, model=body.model, choices=[])

    def event(choices: list[Choice], usage: Usage | None) -> str:
        shown = template.model_copy(update={"choices": choices, "usage": usage})
        return _event(shown.model_dump(exclude=None if wants_usage else {"usage"}))

    try:
        async with aclosing(rest):
            yield event([first.choice], None)
            usage = first.usage
            async for chunk in rest:
                yield event([chunk.choice], None)
                usage = chunk.usage
        if wants_usage:
            yield event([], usage)
        yield "data: [DONE]\n\n"
    except Exception as error:
        told = api_error(error)
        if told.status == 500:
            _log.error("the stream %s failed", answer_id, exc_info=error)
        yield _event(told.body)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
