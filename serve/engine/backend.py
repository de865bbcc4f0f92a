"""What the HTTP side needs of an engine, and the engine in this very process that gives it.

The same engine behind Ray Serve is in remote.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol

from serve.engine.generation import Chunk, GenerationEngine, Job
from serve.failures import BusyError
from serve.wire.completions import CompletionRequest
from serve.wire.models import ModelCard

_BEGUN, _ENDED = object(), object()


class Backend(Protocol):
    """Generation as the HTTP side sees it; every method raises what `failures.api_error` understands."""

    async def models(self) -> list[ModelCard]:
        """The models that may be served now, the base model first."""
        ...

    def complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        """The chunks of an answer; closing the iterator ends the work within one token."""
        ...

    async def check_ready(self) -> None:
        """Return once the model has made a token; raise if it cannot."""
        ...


class LocalBackend:
    """Runs an engine on a few threads; requests beyond them wait their turn, first come, first served.

    Args:
        max_concurrent: requests that generate at the same time.
        wait_s: seconds that a request waits for its turn.
    """

    def __init__(self, engine: GenerationEngine, max_concurrent: int = 4, wait_s: float = 60.0) -> None:
        self._engine, self._wait_s = engine, wait_s
        self._lanes = ThreadPoolExecutor(max_concurrent, thread_name_prefix="generation")
        self._max_concurrent = max_concurrent

    async def models(self) -> list[ModelCard]:
        return await asyncio.to_thread(self._engine.models)

    async def check_ready(self) -> None:
        await asyncio.to_thread(self._engine.probe)

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        job = await asyncio.to_thread(self._engine.prepare, request)
        news: asyncio.Queue[Any] = asyncio.Queue()
        loop, gone = asyncio.get_running_loop(), threading.Event()

        def tell(item: Any) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        lane = self._lanes.submit(self._run, job, tell, gone)
        try:
            await self._turn(news)
            while (item := await news.get()) is not _ENDED:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            # A request in the queue is taken out of it; one that runs sees the event after its next token.
            gone.set()
            lane.cancel()

    async def _turn(self, news: asyncio.Queue[Any]) -> None:
        try:
            await asyncio.wait_for(news.get(), self._wait_s)
        except asyncio.TimeoutError:
            raise BusyError(
                f"{self._max_concurrent} requests were ahead for {self._wait_s:g} s; try again later"
            ) from None

    def _run(self, job: Job, tell: Callable[[Any], None], gone: threading.Event) -> None:
        tell(_BEGUN)
        try:
            with closing(self._engine.generate(job)) as chunks:
                for chunk in chunks:
                    if gone.is_set():
                        return
                    if not chunk.is_silent:
                        tell(chunk)
            tell(_ENDED)
        except Exception as error:
            tell(error)
