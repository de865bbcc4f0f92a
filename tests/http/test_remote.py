"""What the HTTP side makes of engines that are lost. Deaths of real ones are in cluster/test_service_replicas.py; here
they come at moments, and as often, as no real one can be made to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayError

from serve.engine.layout import Chunk
from serve.failures import ApiError
from serve.remote import _asked, _chunks
from serve.wire.base import Usage
from serve.wire.completions import Choice

BEGINNING = Chunk(Choice(index=0, text="a"), None)
END = Chunk(Choice(index=0, text="b"), Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3))
LOST = [ActorDiedError(), ActorUnavailableError("away", None), ObjectLostError("0" * 56, None, "")]


class Stream:
    """What Ray Serve hands out for a call: these items, and an error, if there is one, in place of the end."""

    def __init__(self, *items: Chunk | ApiError, error: Exception | None = None) -> None:
        self._items, self._error = items, error
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Chunk | ApiError]:
        for item in self._items:
            yield item
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled = True


def told(streams: Sequence[Stream]) -> tuple[list[Chunk], ApiError | None, int]:
    """The chunks of an answer for which these calls are made one after another, its error, and how many were made."""
    calls = iter(streams)
    got: list[Chunk] = []

    async def read() -> None:
        async for chunk in _chunks(lambda: next(calls)):
            got.append(chunk)  # noqa: PERF401 (what came before an error counts)

    error = None
    try:
        asyncio.run(read())
    except ApiError as failure:
        error = failure
    return got, error, len(streams) - len(list(calls))


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_another_is_asked_for_what_had_not_begun(error: RayError) -> None:
    first = Stream(error=error)
    assert told([first, Stream(BEGINNING, END)]) == ([BEGINNING, END], None, 2)
    assert first.cancelled


def test_two_losses_are_the_clients_to_know() -> None:
    got, error, asked = told([Stream(error=LOST[0]), Stream(error=LOST[0]), Stream(BEGINNING, END)])
    assert (got, asked) == ([], 2)
    assert error is not None and (error.status, error.retry_after_s) == (503, 5)


def test_what_had_begun_ends_with_an_error() -> None:
    got, error, asked = told([Stream(BEGINNING, error=LOST[0]), Stream(BEGINNING, END)])
    assert (got, asked) == ([BEGINNING], 1)
    assert error is not None and error.status == 503


def test_what_was_whole_lacks_nothing() -> None:
    assert told([Stream(BEGINNING, END, error=LOST[0])]) == ([BEGINNING, END], None, 1)


def test_request_that_takes_too_much_memory_is_not_tried_on_another() -> None:
    got, error, asked = told([Stream(error=OutOfMemoryError("too much")), Stream(BEGINNING, END)])
    assert (got, asked) == ([], 1)
    assert error is not None and error.status == 503


def test_refusal_is_no_loss() -> None:
    refusal = ApiError("no", 404)
    assert told([Stream(refusal), Stream(END)]) == ([], refusal, 1)


@pytest.mark.parametrize("losses", [1, 2])
def test_questions_are_asked_twice(losses: int) -> None:
    asked = 0

    async def answer() -> Any:
        nonlocal asked
        asked += 1
        if asked <= losses:
            raise LOST[0]
        return "well"

    if losses == 1:
        assert asyncio.run(_asked(answer)) == "well"
    else:
        with pytest.raises(ApiError, match="restarted"):
            asyncio.run(_asked(answer))
    assert asked == 2
