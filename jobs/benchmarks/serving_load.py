"""Tenants that ask a service over HTTP, each one request after the other, and what each of them waited for.

Speaks OpenAI's completions with the standard library alone, so that the clock measures the server."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ot_ray.errors import LaunchError

_RETRIED = (429, 503)
_MOST_TRIES = 100


@dataclass(frozen=True)
class Answer:
    """One completion: seconds until the first text and until the end, tokens, and the text."""

    model: str
    first_s: float
    whole_s: float
    tokens: int
    text: str
    retries: int


@dataclass(frozen=True)
class Load:
    """What every tenant asks.

    Args:
        prompts: one of token ids a request; a tenant sends them all, in this order.
        max_tokens: of every answer.
        timeout_s: that one answer may take.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    timeout_s: float


def drive(url: str, models: Sequence[str], load: Load) -> tuple[float, list[Answer]]:
    """Let one tenant a model send its requests, all tenants at the same time.

    Args:
        url: as OpenAI clients take it, ending in `/v1`.

    Returns:
        Seconds from the first request to the last answer, and the answers.

    Raises:
        LaunchError: the server refused a request for good, or broke off.
    """
    start = threading.Barrier(len(models) + 1)
    with ThreadPoolExecutor(len(models)) as tenants:
        asked = [tenants.submit(_ask_all, url, model, load, start) for model in models]
        start.wait()
        begun = time.perf_counter()
        answers = [answer for tenant in asked for answer in tenant.result()]
        return time.perf_counter() - begun, answers


def figures(seconds: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """One round in numbers: rates a second, milliseconds to the first token."""
    waits = sorted(answer.first_s * 1000 for answer in answers)
    return {
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": sum(answer.tokens for answer in answers) / seconds,
        "first_token_ms": statistics.median(waits),
        "first_token_ms_p95": waits[min(len(waits) - 1, int(len(waits) * 0.95))],
        "retries": sum(answer.retries for answer in answers),
    }


def _ask_all(url: str, model: str, load: Load, start: threading.Barrier) -> list[Answer]:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=load.timeout_s)
    try:
        start.wait()
        return [_ask(connection, place.path, model, prompt, load.max_tokens) for prompt in load.prompts]
    except (OSError, http.client.HTTPException) as error:
        raise LaunchError(f"{url} broke off while it answered {model}: {error!r}") from None
    finally:
        connection.close()


def _ask(
    connection: http.client.HTTPConnection, path: str, model: str, prompt: Sequence[int], max_tokens: int
) -> Answer:
    body = json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    begun, said = time.perf_counter(), ""
    for tries in range(_MOST_TRIES):
        connection.request("POST", f"{path}/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status == 200:
            return _read(response, model, begun, tries)
        said = response.read().decode(errors="replace")
        if response.status not in _RETRIED:
            raise LaunchError(f"the service answered {response.status} to {model}: {said[:500]}")
        time.sleep(float(response.headers.get("retry-after", "1")))
    raise LaunchError(f"the service refused {model} {_MOST_TRIES} times, the last time with: {said[:500]}")


def _read(response: http.client.HTTPResponse, model: str, begun: float, retries: int) -> Answer:
    first, text, usage = None, "", None
    while line := response.readline():
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise LaunchError(f"the service broke off its answer to {model}: {event['error']['message']}")
        for choice in event["choices"]:
            first = first or time.perf_counter()
            text += choice["text"]
        usage = event.get("usage") or usage
    ended = time.perf_counter()
    if usage is None:
        raise LaunchError(f"the answer to {model} ended without a count of its tokens")
    return Answer(model, (first or ended) - begun, ended - begun, usage["completion_tokens"], text, retries)
