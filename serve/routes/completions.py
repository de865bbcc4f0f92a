"""`/v1/completions`: whole answers, and streams of server-sent events.

Generation is the backend's; this module only lays its chunks out."""

from __future__ import annotations

import secrets
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from serve.engine.backend import Backend
from serve.engine.layout import Chunk
from serve.routes import service_of
from serve.routes.generating import check_model, stream
from serve.routes.identity import Identity, needs
from serve.routes.once import OnceRoute
from serve.wire.base import Usage
from serve.wire.completions import Choice, Completion, CompletionRequest, Logprobs

router = APIRouter(prefix="/v1", route_class=OnceRoute)


@router.post("/completions", response_model=Completion, summary="Create a completion")
async def complete(
    request: Request, body: CompletionRequest, identity: Annotated[Identity, Depends(needs("inference"))]
) -> Response:
    """Continue one or more prompts."""
    service = service_of(request)
    check_model(service, identity, body.model)
    answer_id = f"cmpl-{secrets.token_hex(16)}"
    if body.stream:
        return await _stream(service.backend, body, answer_id, identity.tenant_id)
    return JSONResponse((await _whole(service.backend, body, answer_id, identity.tenant_id)).model_dump())


async def _whole(backend: Backend, body: CompletionRequest, answer_id: str, asker: str) -> Completion:
    choices: dict[int, Choice] = {}
    usage = None
    async with aclosing(backend.complete(body, asker)) as chunks:
        async for chunk in chunks:
            piece, usage = chunk.choice, chunk.usage
            choice = choices.setdefault(piece.index, Choice(index=piece.index))
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason
            if piece.logprobs is not None:
                choice.logprobs = choice.logprobs or Logprobs()
                choice.logprobs.extend(piece.logprobs)
    ordered = [choices[index] for index in sorted(choices)]
    return Completion(id=answer_id, model=body.model, choices=ordered, usage=usage)


async def _stream(backend: Backend, body: CompletionRequest, answer_id: str, asker: str) -> Response:
    template = Completion(id=answer_id, model=body.model, choices=[])

    def events(chunk: Chunk) -> list[Completion]:
        return [template.model_copy(update={"choices": [chunk.choice]})]

    def last(usage: Usage) -> Completion:
        return template.model_copy(update={"usage": usage})

    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    return await stream(backend.complete(body, asker), answer_id, events, last if wants_usage else None)
