"""Clients that ask a service all the time, with OpenAI's own package, and keep every answer as it came."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.cluster.deployed import PATIENCE_S
from tests.http.tiny_service import PLAIN_TEXT, tokens_of

PROMPT = "Hello"
TOKENS = 60
ASKED: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "logit_bias": PLAIN_TEXT}
# What OpenAI's client raises of an answer that breaks off.
BROKEN = (openai.APIError, httpx.TransportError)


@dataclass
class Answer:
    """What a client saw of one request."""

    streamed: bool
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    """By choice."""
    whole: bool = False
    """Every choice came to its end, and the usage was told."""
    begun: bool = False
    """Something came."""
    error: BaseException | None = None
    ended: float = 0.0
    """Seconds of the monotonic clock."""

    def __str__(self) -> str:
        kind = "stream" if self.streamed else "answer"
        return f"{kind}, begun={self.begun}, whole={self.whole}, {len(self.texts)} choices, error={self.error!r}"


def expected(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: int = TOKENS) -> str:
    """What Transformers itself says."""
    prompt = torch.tensor([tokens_of(PROMPT)])
    suppressed = [int(token) for token in PLAIN_TEXT]
    made = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=tokens,
        suppress_tokens=suppressed,
    )
    return str(tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))


def ask_whole(client: openai.OpenAI, model: str, tokens: int = TOKENS) -> Answer:
    """Ask for an answer in one piece."""
    answer = Answer(streamed=False)
    try:
        found = client.completions.create(model=model, max_tokens=tokens, **ASKED)
        answer.begun = True
        answer.texts[0] = found.choices[0].text
        answer.whole = found.choices[0].finish_reason is not None and found.usage is not None
    except BROKEN as error:
        answer.error = error
    answer.ended = time.monotonic()
    return answer


def ask_stream(
    client: openai.OpenAI, model: str, n: int = 1, tokens: int = TOKENS, began: threading.Event | None = None
) -> Answer:
    """Ask for a stream of `n` choices, and read it to its end.

    Args:
        began: is set with the first event.
    """
    answer, ends, usage = Answer(streamed=True), set(), None
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "n": n}
    try:
        with client.completions.create(model=model, max_tokens=tokens, **ASKED, **fields) as chunks:
            for chunk in chunks:
                answer.begun = True
                if began is not None:
                    began.set()
                for choice in chunk.choices:
                    answer.texts[choice.index] += choice.text
                    if choice.finish_reason is not None:
                        ends.add(choice.index)
                usage = chunk.usage or usage
        answer.whole = len(ends) == n and usage is not None
    except BROKEN as error:
        answer.error = error
    answer.ended = time.monotonic()
    return answer


@contextmanager
def load(
    client: openai.OpenAI, model: str, streams: int = 4, wholes: int = 4, n: int = 1, tokens: int = TOKENS
) -> Iterator[list[Answer]]:
    """Ask all the time until the end of the block: so many threads each way.

    Args:
        n: choices of a stream.

    Yields:
        The answers so far; whole at the end of the block. Every thread has had one at its beginning.
    """
    answers: list[Answer] = []
    stop = threading.Event()
    asks: list[Callable[[], Answer]] = [lambda: ask_stream(client, model, n, tokens)] * streams
    asks += [lambda: ask_whole(client, model, tokens)] * wholes
    first = [threading.Event() for _ in asks]

    def go_on(ask: Callable[[], Answer], had_one: threading.Event) -> None:
        while not stop.is_set():
            answers.append(ask())
            had_one.set()

    with ThreadPoolExecutor(len(asks)) as threads:
        running = [threads.submit(go_on, ask, had_one) for ask, had_one in zip(asks, first, strict=True)]
        try:
            for had_one in first:
                assert had_one.wait(PATIENCE_S), "the service does not answer"
            yield answers
        finally:
            stop.set()
            for future in running:
                future.result()


def check(answers: Sequence[Answer], *texts: str) -> list[Answer]:
    """Every answer is one of these texts, whole, or an error that the client was told of.

    Returns:
        Those that broke off.
    """
    broken = [answer for answer in answers if answer.error is not None]
    for answer in answers:
        if answer.error is None:
            assert answer.whole, f"an answer ended silently before its end: {answer}"
            assert set(answer.texts.values()) <= set(texts), f"{dict(answer.texts)} is none of {texts}"
            assert len(set(answer.texts.values())) == 1, f"choices of two versions: {dict(answer.texts)}"
    return broken


@contextmanager
def long_streams(client: openai.OpenAI, model: str, count: int, n: int, tokens: int) -> Iterator[list[Future[Answer]]]:
    """Streams of `n` choices that have begun, each read by a thread."""
    with ThreadPoolExecutor(count) as threads:
        began = [threading.Event() for _ in range(count)]
        futures = [threads.submit(ask_stream, client, model, n, tokens, event) for event in began]
        for event in began:
            assert event.wait(PATIENCE_S), "a stream does not begin"
        yield futures
