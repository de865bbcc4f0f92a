"""Webhook endpoints as types, in the shapes of OpenAI's `webhook_endpoints`, and which addresses may be called.

Delivering is left to the controller."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, Field

from ot_ray.config import Config
from serve.wire.base import Request, at_most

EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)


class WebhookConfig(Config):
    """How webhooks are delivered, and where to."""

    allow_http: bool = False
    """Take endpoints without TLS; bodies hold ids only, but anyone on the way can read and delay them."""
    allow_private: bool = False
    """Call loopback, private and link-local addresses. Off, so that nobody reaches the service's own network through
    an endpoint; turn it on only where every tenant may reach that network anyway."""
    ca_file: str | None = None
    """PEM file of the authorities that endpoints' certificates are checked against; null for the system's."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds from the look-up of the name to the answer's status, for one delivery."""
    first_retry_s: float = Field(default=5.0, gt=0)
    """Seconds before the second try; each further pause is twice the last one."""
    longest_retry_s: float = Field(default=6 * 3600.0, gt=0)
    """Longest pause between two tries, in seconds."""
    give_up_s: float = Field(default=72 * 3600.0, gt=0)
    """Seconds after the event until which a delivery is tried."""
    concurrent: int = Field(default=8, ge=1)
    """Deliveries that wait for their endpoints at once."""
    endpoints_per_tenant: int = Field(default=20, ge=1)
    """Endpoints that one tenant may have."""
    keep_s: float = Field(default=30 * 24 * 3600.0, ge=0)
    """Seconds for which deliveries that were made or given up, and removed endpoints, stay in the database."""


def forbidden_address(address: str) -> bool:
    """Whether an IP address lies in a network that is not the public internet, however it is written."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # Addresses of IPv4 in IPv6's clothes: mapped, 6to4, Teredo's client, and NAT64's well-known prefix.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return forbidden_address(str(inner))
    return not ip.is_global or ip.is_multicast or ip.is_reserved


def url_problem(url: str, config: WebhookConfig) -> str | None:
    """Why an endpoint's URL is not taken; None if it may be. Names are judged again when they are resolved."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "it is not a URL"
    if port == 0:
        return "it has port 0"
    if parts.scheme != "https" and not (parts.scheme == "http" and config.allow_http):
        return "it must start with https://"
    host = parts.hostname
    if not host or parts.username is not None or parts.password is not None:
        return "it must name a host, and no user or password"
    if parts.fragment or "#" in url:
        return "it must have no fragment (#...)"
    return None if config.allow_private else _host_problem(host)


def _host_problem(host: str) -> str | None:
    try:
        forbidden = forbidden_address(host)
    except ValueError:
        name = host.rstrip(".").lower()
        forbidden = name == "localhost" or name.endswith((".localhost", ".local", ".internal"))
    return "its host is not on the public internet" if forbidden else None


def request_target(parts: SplitResult) -> str:
    """What stands after the method in the request line."""
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _plain_url(url: str) -> str:
    # Anything else could end the request line or hide the host from the reader.
    if not url.isascii() or any(not "!" <= letter <= "~" or letter in '\\"<>^`{|}' for letter in url):
        raise ValueError("a URL holds printed ASCII characters only; write others as %-escapes or xn-- names")
    return url


def _plain_name(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("a name is at least one printed character")
    return name


def _once_each(events: list[EventType]) -> list[EventType]:
    return sorted(set(events))


_Url = Annotated[str, Field(max_length=2048), AfterValidator(_plain_url)]
_Events = Annotated[list[EventType], at_most(16), Field(min_length=1, max_length=16), AfterValidator(_once_each)]
_Name = Annotated[str, Field(max_length=256), AfterValidator(_plain_name)]


class WebhookRequest(Request):
    """The body of `POST /v1/webhook_endpoints`."""

    url: _Url
    """Where to send events."""
    event_types: _Events
    """Which events to send."""
    name: _Name = "webhook"
    """For people."""


class WebhookChange(Request):
    """The body of `POST /v1/webhook_endpoints/{id}`: what is left out stays as it is."""

    url: _Url | None = None
    """Where to send events."""
    event_types: _Events | None = None
    """Which events to send, all of them."""
    name: _Name | None = None
    """For people."""


class RotateSecretRequest(Request):
    """The body of `POST /v1/webhook_endpoints/{id}/rotate_secret`."""

    keep_old_secret_active_for_24_hours: bool = False
    """Sign with the old secret too, for a day, so that receivers have time to change."""


class WebhookTestRequest(Request):
    """The body of `POST /v1/webhook_endpoints/{id}/test`."""

    event_type: EventType
    """Which event to send a sample of."""


class WebhookTestResult(BaseModel):
    """What an endpoint answered to a sample."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: EventType
    status_code: int
    """The HTTP status of the answer."""
    success: Literal[True] = True
    """That there was an answer."""


class EventTypes(BaseModel):
    """Every event that an endpoint can be told of."""

    object: Literal["list"] = "list"
    data: list[EventType]


class WebhookEndpoint(BaseModel):
    """One endpoint, without its secret."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    """The last four characters of the secret."""


class NewWebhookEndpoint(WebhookEndpoint):
    """An endpoint with its signing secret, as it is answered once: at creation or rotation.

    To a repetition with the same `Idempotency-Key` the secret is null; rotate it if the first answer was lost.
    """

    signing_secret: str | None = Field(repr=False)


class DeletedWebhookEndpoint(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True
