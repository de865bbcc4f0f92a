"""`/v1/webhook_endpoints`: where a tenant wants to be told that its jobs have ended.

Events are sent by the controller, which judges the address again each time; here a sample is, if asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request

from ot_ray.errors import NotFoundError
from serve.catalogue import Catalogue, new_id
from serve.catalogue.records import Webhook
from serve.catalogue.webhooks import webhook_event
from serve.failures import ApiError
from serve.outbound import OutboundError
from serve.routes import service_of
from serve.routes.identity import Identity, needs, noted
from serve.routes.once import OnceRoute, once_of
from serve.routes.transfers import in_thread
from serve.webhook_requests import send
from serve.wire.paging import After, Limit, Listing, shown, unknown_cursor
from serve.wire.webhooks import (
    EVENT_TYPES,
    DeletedWebhookEndpoint,
    EventTypes,
    NewWebhookEndpoint,
    RotateSecretRequest,
    WebhookChange,
    WebhookEndpoint,
    WebhookRequest,
    WebhookTestRequest,
    WebhookTestResult,
    url_problem,
)

router = APIRouter(prefix="/v1", tags=["Webhooks"], route_class=OnceRoute)

Asker = Annotated[Identity, Depends(needs("jobs"))]
_PLACE = "/webhook_endpoints"
_SECRET = "signing_secret"
_SAMPLE = f"ftjob-{'0' * 24}"


@router.post(_PLACE, summary="Create a webhook endpoint")
def create_endpoint(request: Request, body: WebhookRequest, identity: Asker) -> NewWebhookEndpoint:
    """Have events sent to an address. The answer holds the signing secret, which is shown this once."""
    _require_callable(request, body.url)
    once, most = once_of(request), service_of(request).settings.webhooks.endpoints_per_tenant
    once.hide(_SECRET)
    webhook = _catalogue(request).webhooks.create(
        identity.tenant_id,
        body.url,
        body.event_types,
        name=body.name,
        webhook_id=once.new_id("wh_"),
        most=most,
        audit=noted(request, identity, "webhook.create", host=_host(body.url), events=body.event_types),
    )
    if webhook is None:
        raise ApiError(
            f"You have {most} webhook endpoints, which is the most; delete one that you no longer need.",
            code="too_many_webhook_endpoints",
        )
    return _with_secret(webhook)


@router.get(_PLACE, summary="List webhook endpoints")
def list_endpoints(
    request: Request, identity: Asker, after: After = None, limit: Limit = 20
) -> Listing[WebhookEndpoint]:
    """The asker's endpoints, the newest first."""
    try:
        page = _catalogue(request).webhooks.list(identity.tenant_id, after=after, limit=limit)
    except NotFoundError:
        raise unknown_cursor("webhook endpoint", after) from None
    return Listing.of([_endpoint(webhook) for webhook in page.items], page.has_more)


@router.get(_PLACE + "/{webhook_id}", summary="Retrieve a webhook endpoint")
def get_endpoint(request: Request, webhook_id: str, identity: Asker) -> WebhookEndpoint:
    """One endpoint."""
    with _told(webhook_id):
        return _endpoint(_catalogue(request).webhooks.get(identity.tenant_id, webhook_id))


@router.post(_PLACE + "/{webhook_id}", summary="Update a webhook endpoint")
def update_endpoint(request: Request, webhook_id: str, body: WebhookChange, identity: Asker) -> WebhookEndpoint:
    """Change an endpoint's address, events or name; what is left out stays."""
    if body.url is not None:
        _require_callable(request, body.url)
    told = {"host": _host(body.url)} if body.url is not None else {}
    line = noted(request, identity, "webhook.update", **told)
    webhooks, changes = _catalogue(request).webhooks, {"url": body.url, "events": body.event_types, "name": body.name}
    with _told(webhook_id):
        return _endpoint(webhooks.update(identity.tenant_id, webhook_id, **changes, audit=line))


@router.post(_PLACE + "/{webhook_id}/rotate_secret", summary="Rotate a webhook endpoint's signing secret")
def rotate_secret(
    request: Request, webhook_id: str, identity: Asker, body: RotateSecretRequest | None = None
) -> NewWebhookEndpoint:
    """Sign with a fresh secret from the next try on; the answer holds it, this once."""
    once, keep_old = once_of(request), body is not None and body.keep_old_secret_active_for_24_hours
    once.hide(_SECRET)
    line = noted(request, identity, "webhook.rotate_secret", keep_old=keep_old)
    key, webhooks = once.new_bytes(_SECRET), _catalogue(request).webhooks
    with _told(webhook_id):
        return _with_secret(
            webhooks.rotate_secret(identity.tenant_id, webhook_id, key=key, keep_old=keep_old, audit=line)
        )


@router.post(_PLACE + "/{webhook_id}/test", summary="Test a webhook endpoint")
async def test_endpoint(
    request: Request, webhook_id: str, body: WebhookTestRequest, identity: Asker
) -> WebhookTestResult:
    """Send a sample of an event at once, signed like any other, and tell the status of the answer."""
    with _one_sample(request, identity.tenant_id):
        status = await in_thread(_send_sample, request, identity, webhook_id, body.event_type)
    return WebhookTestResult(webhook_endpoint_id=webhook_id, event_type=body.event_type, status_code=status)


@router.get("/webhook_event_types", summary="List webhook event types")
def list_event_types(identity: Asker) -> EventTypes:
    """The events that an endpoint can be told of."""
    return EventTypes(data=[*EVENT_TYPES])


@router.delete(_PLACE + "/{webhook_id}", summary="Delete a webhook endpoint")
def delete_endpoint(request: Request, webhook_id: str, identity: Asker) -> DeletedWebhookEndpoint:
    """Send nothing more to an address, of what is on its way neither."""
    with _told(webhook_id):
        _catalogue(request).webhooks.disable(identity.tenant_id, webhook_id, noted(request, identity, "webhook.delete"))
    return DeletedWebhookEndpoint(id=webhook_id)


def _send_sample(request: Request, identity: Identity, webhook_id: str, type: str) -> int:
    with _told(webhook_id):
        webhook = _catalogue(request).webhooks.get(identity.tenant_id, webhook_id)
    now = time.time()
    payload = webhook_event(new_id("evt_"), type, _SAMPLE, int(now))
    try:
        return send(webhook, payload, now, service_of(request).settings.webhooks)
    except OutboundError as error:
        raise ApiError(f"The endpoint did not answer: {error}.", code="webhook_test_failed") from None


@contextmanager
def _one_sample(request: Request, tenant_id: str) -> Iterator[None]:
    """The one sample that a tenant sends at a time on this replica: each waits for somebody else's machine."""
    # Only the event loop's thread looks here.
    under_way: set[str] = getattr(request.app.state, "samples", None) or set()
    request.app.state.samples = under_way
    if tenant_id in under_way or len(under_way) >= service_of(request).settings.webhooks.concurrent:
        raise ApiError("Another sample is under way; wait for it.", 429, "rate_limit_exceeded", retry_after_s=1)
    under_way.add(tenant_id)
    try:
        yield
    finally:
        under_way.discard(tenant_id)


def _require_callable(request: Request, url: str) -> None:
    problem = url_problem(url, service_of(request).settings.webhooks)
    if problem is not None:
        raise ApiError(f"The URL cannot be called: {problem}.", code="invalid_webhook_url", param="url")


def _host(url: str) -> str | None:
    """What the audit log is told of an address: paths often hold a secret of their own."""
    return urlsplit(url).hostname


@contextmanager
def _told(webhook_id: str) -> Iterator[None]:
    try:
        yield
    except NotFoundError:
        raise ApiError(f"No such webhook endpoint: {shown(webhook_id)}", 404, "webhook_endpoint_not_found") from None


def _endpoint(webhook: Webhook) -> WebhookEndpoint:
    return WebhookEndpoint(
        id=webhook.id,
        created_at=webhook.created_at,
        updated_at=webhook.updated_at,
        name=webhook.name,
        url=webhook.url,
        event_types=webhook.events,
        signing_secret_hint=webhook.secret[-4:],
    )


def _with_secret(webhook: Webhook) -> NewWebhookEndpoint:
    return NewWebhookEndpoint(**_endpoint(webhook).model_dump(), signing_secret=webhook.secret)


def _catalogue(request: Request) -> Catalogue:
    catalogue = service_of(request).catalogue
    assert catalogue is not None, "these routes are mounted over a database only"
    return catalogue
