"""`/v1/chat/completions`: whole answers, and streams of server-sent events.

Laying conversations out and generating are the backend's; this module only lays its chunks out."""

from __future__ import annotations

import secrets
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from serve.engine.backend import Backend
from serve.engine.layout import ChatChunk
from serve.routes import service_of
from serve.routes.generating import check_model, stream
from serve.routes.identity import Identity, needs
from serve.routes.once import OnceRoute
from serve.wire.base import Usage
from serve.wire.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
)

router = APIRouter(prefix="/v1", route_class=OnceRoute)


@router.post("/chat/completions", response_model=ChatCompletion, summary="Create a chat completion")
async def chat(
    request: Request, body: ChatRequest, identity: Annotated[Identity, Depends(needs("inference"))]
) -> Response:
    """Say what comes next in a conversation."""
    service = service_of(request)
    check_model(service, identity, body.model)
    answer_id = f"chatcmpl-{secrets.token_hex(16)}"
    if body.stream:
        return await _stream(service.backend, body, answer_id, identity.tenant_id)
    return JSONResponse((await _whole(service.backend, body, answer_id, identity.tenant_id)).model_dump())


async def _whole(backend: Backend, body: ChatRequest, answer_id: str, asker: str) -> ChatCompletion:
    choices: dict[int, ChatChoice] = {}
    usage = None
    async with aclosing(backend.chat(body, asker)) as chunks:
        async for chunk in chunks:
            usage = chunk.usage
            choice = choices.setdefault(chunk.index, ChatChoice(index=chunk.index))
            choice.message.content += chunk.content
            choice.finish_reason = chunk.finish_reason
            if body.logprobs:
                choice.logprobs = choice.logprobs or ChatLogprobs(content=[])
                choice.logprobs.content += chunk.logprobs.content if chunk.logprobs else []
    ordered = [choices[index] for index in sorted(choices)]
    return ChatCompletion(id=answer_id, model=body.model, choices=ordered, usage=usage)


async def _stream(backend: Backend, body: ChatRequest, answer_id: str, asker: str) -> Response:
    template = ChatCompletionChunk(id=answer_id, model=body.model, choices=[])
    begun: set[int] = set()

    def events(chunk: ChatChunk) -> list[ChatCompletionChunk]:
        parts: list[ChatChunkChoice] = []
        if chunk.index not in begun:
            begun.add(chunk.index)
            parts.append(ChatChunkChoice(index=chunk.index, delta=ChatDelta(**AssistantMessage().model_dump())))
        if chunk.content or chunk.logprobs:
            delta = ChatDelta(content=chunk.content)
            parts.append(ChatChunkChoice(index=chunk.index, delta=delta, logprobs=chunk.logprobs))
        if chunk.finish_reason:
            parts.append(ChatChunkChoice(index=chunk.index, delta=ChatDelta(), finish_reason=chunk.finish_reason))
        return [template.model_copy(update={"choices": [part]}) for part in parts]

    def last(usage: Usage) -> ChatCompletionChunk:
        return template.model_copy(update={"usage": usage})

    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    return await stream(backend.chat(body, asker), answer_id, events, last if wants_usage else None)
