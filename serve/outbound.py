"""One HTTP POST to an address that somebody else chose: no detours, no waiting, nothing believed.

What is posted is webhook_requests.py's; what follows from the answer, the caller's."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from urllib.parse import SplitResult, urlsplit

import h11

from ot_ray.errors import ConfigError
from serve.wire.webhooks import WebhookConfig, forbidden_address, request_target, url_problem

Resolver = Callable[[str, int], Sequence[str]]

_MOST_BYTES = 64 * 2**10
_PORTS = {"http": 80, "https": 443}


class OutboundError(Exception):
    """No answer was had; the message says why, in words that may be stored."""


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, each once, in the order of the system's preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


@cache
def trust(ca_file: str | None) -> ssl.SSLContext:
    """Which certificates are believed: those of the authorities in a PEM file, or of the system's.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        reason = error.strerror or "it holds no certificate"
        raise ConfigError(f"webhooks.ca_file is {ca_file!r}: {reason}; name a PEM file of certificates") from None


def post(url: str, headers: Mapping[str, str], body: bytes, config: WebhookConfig, resolver: Resolver = resolve) -> int:
    """Send a body and return the status of the answer, whatever it is; redirects are answers like any other.

    The name is resolved once, every address it stands for is judged, and the connection goes to one of them, so that
    a name which changes in between leads nowhere else. The answer's body is not read, of its head 64 KiB at most. The
    system's resolver keeps its own time; everything after it ends `config.timeout_s` after the beginning.

    Raises:
        OutboundError: the address may not be called, or nothing there speaks HTTP in time.
    """
    deadline = time.monotonic() + config.timeout_s
    problem = url_problem(url, config)
    if problem is not None:
        raise OutboundError(f"the URL may not be called: {problem}")
    parts = urlsplit(url)
    try:
        with contextlib.closing(_connect(parts, config, resolver, deadline)) as connection:
            return _exchange(connection, parts, headers, body, deadline)
    except TimeoutError:
        raise OutboundError(f"no answer within {config.timeout_s:g} seconds") from None
    except ssl.SSLError as error:
        raise OutboundError(f"TLS failed: {error.reason or 'the connection was cut'}") from None
    except OSError as error:
        raise OutboundError(f"cannot connect: {error.strerror or type(error).__name__}") from None
    except h11.RemoteProtocolError:
        raise OutboundError("what answered does not speak HTTP") from None
    except (h11.LocalProtocolError, ValueError):
        raise OutboundError("the URL cannot be written into a request") from None


def _connect(parts: SplitResult, config: WebhookConfig, resolver: Resolver, deadline: float) -> socket.socket:
    host = parts.hostname or ""
    port = parts.port or _PORTS[parts.scheme]
    try:
        addresses = resolver(host, port)
    except (OSError, UnicodeError):
        raise OutboundError("the host's name cannot be resolved") from None
    if not config.allow_private and any(forbidden_address(address) for address in addresses):
        raise OutboundError("the host's name stands for an address that is not on the public internet")
    plain = _first_that_answers(addresses, port, deadline)
    if parts.scheme == "http":
        return plain
    try:
        plain.settimeout(_left(deadline))
        return trust(config.ca_file).wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _first_that_answers(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    failure: OSError = ConnectionError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=_left(deadline))
        except OSError as error:
            failure = error
    raise failure


def _exchange(
    connection: socket.socket, parts: SplitResult, headers: Mapping[str, str], body: bytes, deadline: float
) -> int:
    protocol = h11.Connection(h11.CLIENT)
    host = parts.netloc.rpartition("@")[2]
    lines = [("host", host), ("connection", "close"), ("content-length", str(len(body))), *headers.items()]
    request = h11.Request(method="POST", target=request_target(parts), headers=lines)
    sent = b"".join(protocol.send(event) or b"" for event in (request, h11.Data(data=body), h11.EndOfMessage()))
    connection.settimeout(_left(deadline))
    connection.sendall(sent)
    taken = 0
    while True:
        event = protocol.next_event()
        if isinstance(event, h11.Response):
            return event.status_code
        if event is not h11.NEED_DATA:
            continue  # an interim answer, such as 103
        connection.settimeout(_left(deadline))
        data = connection.recv(4096)
        taken += len(data)
        if not data or taken > _MOST_BYTES:
            raise OutboundError("the connection was closed without an answer" if not data else "the answer has no end")
        protocol.receive_data(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
