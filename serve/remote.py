"""The engine behind Ray Serve, from both sides: the actor that holds one, and the backend that asks it.

Both are skins over backend.py; deploying them is app.py's part."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, cast

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ot_ray.errors import OTRayError
from serve.config import ServeConfig
from serve.engine.backend import AnyChunk
from serve.engine.batching import EngineStats
from serve.engine.canary import CanaryReport
from serve.engine.layout import ChatChunk, Chunk
from serve.engine.loading import load_backend
from serve.failures import ApiError, api_error
from serve.wire.chat import ChatRequest
from serve.wire.completions import CompletionRequest
from serve.wire.models import ModelCard

_log = logging.getLogger(__name__)
# Of a replica that is gone, or out of reach. One that needed too much memory is not among them: the request may be why.
_LOST = (RayActorError, ObjectLostError)


class Engine:
    """One replica: a local backend, asked from other processes."""

    def __init__(self, config: ServeConfig) -> None:
        self._backend = load_backend(config)

    async def models(self, tenant: str | None = None) -> list[ModelCard]:
        return await self._backend.models(tenant)

    async def find_model(self, name: str) -> ModelCard:
        return await self._backend.find_model(name)

    async def canary(self, model_id: str) -> CanaryReport:
        return await self._backend.canary(model_id)

    async def stats(self) -> EngineStats:
        return await self._backend.stats()

    async def check_ready(self) -> None:
        await self._backend.check_ready()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises here again and again."""
        await self._backend.check_ready()

    async def complete(self, request: CompletionRequest, asker: str = "") -> AsyncGenerator[Chunk | ApiError, None]:
        """The chunks of an answer; a refusal is the last item, because it is no failure of the replica."""
        async with aclosing(_with_refusals(self._backend.complete(request, asker))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def chat(self, request: ChatRequest, asker: str = "") -> AsyncGenerator[ChatChunk | ApiError, None]:
        """As `complete`, of a conversation."""
        async with aclosing(_with_refusals(self._backend.chat(request, asker))) as chunks:
            async for chunk in chunks:
                yield chunk


async def _with_refusals(answer: AsyncGenerator[AnyChunk, None]) -> AsyncGenerator[AnyChunk | ApiError, None]:
    try:
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                yield chunk
    except OTRayError as error:
        yield api_error(error)


class RemoteBackend:
    """A `Backend` that asks the replicas of an engine; what a replica leaves undone when it dies, another is asked for.

    That happens once: a second one that dies under the same request may die of it. The rest is left to clients, which
    are told to try again.

    Args:
        engine: the handle of a deployment of `Engine`.
    """

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine

    async def models(self, tenant: str | None = None) -> list[ModelCard]:
        return await _asked(lambda: self._engine.models.remote(tenant))

    async def find_model(self, name: str) -> ModelCard:
        return await _asked(lambda: self._engine.find_model.remote(name))

    async def canary(self, model_id: str) -> CanaryReport:
        try:
            with _ray_errors_told():
                return await self._engine.canary.remote(model_id)
        except ApiError as error:
            # Its caller judges adapters, and is told what is wrong with one, not what a client may know.
            if isinstance(error.__cause__, RayTaskError) and isinstance(error.__cause__.cause, OTRayError):
                raise error.__cause__.cause from error
            raise

    async def stats(self) -> EngineStats:
        return await _asked(lambda: self._engine.stats.remote())

    async def check_ready(self) -> None:
        await _asked(lambda: self._engine.check_ready.remote())

    async def complete(self, request: CompletionRequest, asker: str = "") -> AsyncGenerator[Chunk, None]:
        method = self._engine.options(stream=True).complete
        async with aclosing(_chunks(lambda: method.remote(request, asker))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def chat(self, request: ChatRequest, asker: str = "") -> AsyncGenerator[ChatChunk, None]:
        method = self._engine.options(stream=True).chat
        async with aclosing(_chunks(lambda: method.remote(request, asker))) as chunks:
            async for chunk in chunks:
                yield chunk


async def _asked(ask: Callable[[], Any]) -> Any:
    """What a replica answers, or another one if that is lost."""
    with _ray_errors_told():
        try:
            return await ask()
        except _LOST as error:
            _log.warning("an engine was lost; another is asked: %s", error)
            return await ask()


async def _chunks(ask: Callable[[], Any]) -> AsyncGenerator[Any, None]:
    """What a replica answers, item by item, with its refusals raised.

    Of one that was lost after its first item, the beginning stays the client's, and what follows is an error."""
    with _ray_errors_told():
        for is_last in (False, True):
            stream, last = cast(DeploymentResponseGenerator[Any], ask()), None
            try:
                async for item in stream:
                    if isinstance(item, ApiError):
                        raise item
                    last = item
                    yield item
                return
            except _LOST as error:
                # It may be out of reach alone: nobody listens to it any more.
                stream.cancel()
                if last is not None and last.usage is not None:
                    return  # with the whole answer
                if last is not None or is_last:
                    raise
                _log.warning("an engine was lost before it said anything; another is asked: %s", error)
            except (asyncio.CancelledError, GeneratorExit):
                # The client went away: the replica stops too.
                stream.cancel()
                raise


@contextmanager
def _ray_errors_told() -> Iterator[None]:
    """Turn Ray's own errors into answers, and unpack those that a replica raised."""
    try:
        yield
    except BackPressureError as error:
        raise ApiError(
            "Too many requests wait for the model; try again later.",
            error.status_code,
            "overloaded",
            retry_after_s=math.ceil(error.retry_after_s or 1),
        ) from None
    except (*_LOST, OutOfMemoryError, DeploymentUnavailableError, ReplicaUnavailableError):
        raise ApiError("The model is being restarted; try again.", 503, "unavailable", retry_after_s=5) from None
    except RayTaskError as error:
        raise api_error(error.cause) from error
