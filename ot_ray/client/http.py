"""Requests to the service by the standard library alone: a key that is never shown, and retries that ask first.

What is asked for is left to client.py."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from ot_ray.errors import ConfigError, OTRayError, ServiceError

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_S = 30.0
_MOST_ANSWER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Answer:
    """What came back; `headers` by lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, or what stands in for one."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            error = json.loads(self.body)["error"]
            if isinstance(error, dict):
                return error
        return {"message": f"the service answered {self.status}", "code": None}


class Http:
    """One service and one key.

    Args:
        url: such as `https://host`; a path that the service is mounted under may follow.
        timeout_s: seconds without a byte after which a connection counts as dead.
        patience_s: seconds for which a request is tried again.

    Raises:
        ConfigError: the URL is none, or the key cannot stand in a header.
    """

    def __init__(self, url: str, key: str, timeout_s: float = 60.0, patience_s: float = 300.0) -> None:
        parts = _service(url)
        if parts is None:
            raise ConfigError(f"{url!r} is no service; use https://host, with a port or a path where it needs them")
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            # Never shown: messages end up in logs.
            raise ConfigError("the key is empty or holds characters that no key has; set OT_RAY_API_KEY anew")
        self.url = url.rstrip("/")
        self._secure, self._netloc, self._path = parts.scheme == "https", parts.netloc, parts.path.rstrip("/")
        self._key, self._timeout_s, self._patience_s = key, timeout_s, patience_s

    def __repr__(self) -> str:
        return f"Http({self.url!r})"

    def json(self, method: str, path: str, value: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON value that a request is answered with.

        Raises:
            ServiceError: it was refused, or no answer came in time.
        """
        body = None if value is None else json.dumps(value).encode()
        kind = {} if value is None else {"content-type": "application/json"}
        answer = self.answer(method, path, body, {**kind, **(headers or {})})
        self.require(answer, method, path)
        try:
            return json.loads(answer.body)
        except ValueError:
            raise ServiceError(f"{method} {self.url}{path} was not answered with JSON; check the URL") from None

    def answer(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """The answer to a request, whatever its status; one that the service asks to send again is.

        Raises:
            ServiceError: no answer came in time.
        """

        def attempt() -> Answer:
            with self._open(method, path, body, headers or {}) as response:
                return _whole(response)

        return self.patiently(attempt)

    @contextlib.contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """One GET, whose body is read as it comes; not tried again here.

        Raises:
            OSError, http.client.HTTPException: the connection failed.
        """
        with self._open("GET", path, None, headers) as response:
            yield response

    def patiently(self, attempt: Callable[[], Answer]) -> Answer:
        """Repeat an attempt while connections fail or the service asks for it.

        Raises:
            ServiceError: no connection could be made for `patience_s` seconds.
        """
        deadline, pause = time.monotonic() + self._patience_s, 0.25
        while True:
            try:
                answer = attempt()
                wait = _wanted_pause(answer, pause)
                if wait is None or time.monotonic() + wait > deadline:
                    return answer
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OTRayError):
                    raise
                wait = pause * random.uniform(0.5, 1.5)
                if isinstance(error, ssl.SSLCertVerificationError) or time.monotonic() + wait > deadline:
                    raise ServiceError(
                        f"{self.url} does not answer: {error or type(error).__name__}; check the URL, or try again"
                    ) from None
            time.sleep(wait)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def require(self, answer: Answer, method: str, path: str) -> None:
        """Raise ServiceError, in the service's own words, unless a request succeeded."""
        if 300 <= answer.status < 400:
            raise ServiceError(f"{self.url} answers with a redirect, which is not followed with a key; use its target")
        if not 200 <= answer.status < 300:
            told, code = str(answer.error.get("message"))[:2000], answer.error.get("code")
            raise ServiceError(
                f"{method} {self.url}{path} was answered {answer.status}: {told}",
                answer.status,
                code if isinstance(code, str) else None,
            )

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._netloc, timeout=self._timeout_s)
        try:
            every = {"authorization": f"Bearer {self._key}", "accept-encoding": "identity", **headers}
            connection.request(method, self._path + path, body=body, headers=every)
            yield connection.getresponse()
        finally:
            connection.close()


def _service(url: str) -> SplitResult | None:
    """The parts of a service's URL; None if it is none."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and parts.path.isascii() and url.isprintable() and " " not in url
    except ValueError:
        return None
    extra = parts.username is not None or parts.query or parts.fragment
    return parts if plain and parts.scheme in ("http", "https") and parts.hostname and not extra else None


def quoted(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def _whole(response: http.client.HTTPResponse) -> Answer:
    body = response.read(_MOST_ANSWER_BYTES)
    if response.length and len(body) < _MOST_ANSWER_BYTES:
        # Reading up to a number of bytes tells nothing of a connection that broke before the stated length.
        raise http.client.IncompleteRead(body, response.length)
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


def _wanted_pause(answer: Answer, pause: float) -> float | None:
    """Seconds after which the service wants the request again; None if it does not."""
    told = answer.headers.get("x-should-retry")
    after = answer.headers.get("retry-after", "")
    if 200 <= answer.status < 300 or told == "false":
        return None
    if after.isdecimal() and answer.status in (*_RETRIED, 409):
        return min(float(after), 3600.0)
    if told == "true" or answer.status in _RETRIED:
        return pause * random.uniform(0.5, 1.5)
    return None
