"""What the HTTP side needs of an engine, and the engine in this very process that gives it.

The same engine behind Ray Serve is in remote.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from serve.engine.batching import EngineStats
from serve.engine.canary import CanaryReport
from serve.engine.choice import Piece
from serve.engine.generation import GenerationEngine
from serve.engine.job import BEGUN, Job, Told
from serve.engine.layout import ChatChunk, Chunk
from serve.wire.base import Usage
from serve.wire.chat import ChatRequest
from serve.wire.completions import CompletionRequest
from serve.wire.models import ModelCard

AnyChunk = TypeVar("AnyChunk", Chunk, ChatChunk)
_PATIENCE_S = 60.0


class Backend(Protocol):
    """Generation as the HTTP side sees it; every method raises what `failures.api_error` understands.

    Whether the asker may use a model is the HTTP side's to check; `asker` says whose turn it is, and no more.
    """

    async def models(self, tenant: str | None = None) -> list[ModelCard]:
        """The models that may be served now, the base model first, then plug-ins of one tenant or of all."""
        ...

    async def find_model(self, name: str) -> ModelCard:
        """One model, by its id or alias."""
        ...

    def complete(self, request: CompletionRequest, asker: str = "") -> AsyncGenerator[Chunk, None]:
        """The chunks of an answer; closing the iterator ends the work within one token."""
        ...

    def chat(self, request: ChatRequest, asker: str = "") -> AsyncGenerator[ChatChunk, None]:
        """The chunks of an answer to a conversation; closing the iterator ends the work within one token."""
        ...

    async def canary(self, model_id: str) -> CanaryReport:
        """A plug-in, in service or not, against the base model on a fixed text."""
        ...

    async def stats(self) -> EngineStats:
        """What one engine does at the moment."""
        ...

    async def check_ready(self) -> None:
        """Return once the model has computed something, between two tokens of what it is busy with; raise if it
        cannot."""
        ...


class LocalBackend:
    """An engine in this process.

    Args:
        wait_s: seconds that a request waits for its turn.
    """

    def __init__(self, engine: GenerationEngine, wait_s: float = 60.0) -> None:
        self._engine, self._wait_s = engine, wait_s

    async def models(self, tenant: str | None = None) -> list[ModelCard]:
        return await asyncio.to_thread(self._engine.models, tenant)

    async def find_model(self, name: str) -> ModelCard:
        return await asyncio.to_thread(self._engine.find_model, name)

    async def canary(self, model_id: str) -> CanaryReport:
        return await asyncio.to_thread(self._engine.canary, model_id)

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def check_ready(self) -> None:
        # Waits on no thread of its own: those of the event loop may all wait for a store that hangs.
        await asyncio.wait_for(asyncio.wrap_future(self._engine.probe()), _PATIENCE_S)

    async def complete(self, request: CompletionRequest, asker: str = "") -> AsyncGenerator[Chunk, None]:
        job = await asyncio.to_thread(self._engine.prepare, request)
        async with aclosing(self._run(job, asker, self._engine.layout.completion)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def chat(self, request: ChatRequest, asker: str = "") -> AsyncGenerator[ChatChunk, None]:
        job = await asyncio.to_thread(self._engine.prepare_chat, request)
        async with aclosing(self._run(job, asker, self._engine.layout.chat)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _run(
        self, job: Job, asker: str, lay_out: Callable[[Piece, Usage | None], AnyChunk]
    ) -> AsyncGenerator[AnyChunk, None]:
        news: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(told: Told) -> None:
            loop.call_soon_threadsafe(news.put_nowait, told)

        ticket = self._engine.submit(job, tell, asker)
        try:
            told = await self._first(news)
            while True:
                if isinstance(told, BaseException):
                    raise told
                if told is not BEGUN:
                    yield lay_out(*told)
                    if told[1] is not None:
                        return
                told = await news.get()
        finally:
            # Rows are freed before the next token, and a request that waits leaves the queue.
            ticket.cancel()

    async def _first(self, news: asyncio.Queue[Any]) -> Any:
        try:
            return await asyncio.wait_for(news.get(), self._wait_s)
        except asyncio.TimeoutError:
            raise self._engine.too_late() from None
