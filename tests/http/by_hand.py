"""An engine whose batch has no thread of its own: a test makes each pass, so that who joins when is no chance."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from tiny_service import PLAIN_TEXT

from serve.engine.batching import Batcher
from serve.engine.generation import GenerationEngine
from serve.engine.job import BEGUN, Ticket
from serve.wire.completions import CompletionRequest


def by_hand(engine: GenerationEngine) -> Batcher:
    """The engine's batch without a thread of its own: the test makes each pass."""
    batcher = engine._batcher
    batcher._thread = threading.current_thread()
    return batcher


def hand_in(engine: GenerationEngine, asker: str, heard: list[Any], **fields: Any) -> Ticket:
    """Submit a completion, greedy and of plain letters unless told otherwise; what it hears comes into a list."""
    plain = {"model": "tiny", "prompt": "Hello", "temperature": 0, "logit_bias": PLAIN_TEXT}
    return engine.submit(
        engine.prepare(CompletionRequest.model_validate({**plain, **fields})),
        lambda told: None if told is BEGUN else heard.append(told),
        asker,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def passes(batcher: Batcher, done: Callable[[], bool]) -> None:
    """Make passes until a condition holds."""
    deadline = time.monotonic() + 300
    while True:
        batcher._pass()
        if done():
            return
        assert time.monotonic() < deadline, "the batch does not come to an end"
        # An adapter may be on its way.
        if not len(batcher._batch):
            time.sleep(0.005)
