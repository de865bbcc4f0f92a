"""`/v1/webhook_endpoints`: where a tenant wants to be told that its jobs have ended.

Sending is the controller's, which judges the address again each time."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request

from ot_ray.errors import NotFoundError
from serve.catalogue import Catalogue
from serve.catalogue.records import Webhook
from serve.failures import ApiError
from serve.routes import service_of
from serve.routes.identity import Identity, needs, record
from serve.routes.once import OnceRoute, once_of
from serve.wire.paging import After, Limit, Listing, shown, unknown_cursor
from serve.wire.webhooks import (
    DeletedWebhookEndpoint,
    NewWebhookEndpoint,
    WebhookEndpoint,
    WebhookRequest,
    url_problem,
)

router = APIRouter(prefix="/v1/webhook_endpoints", tags=["Webhooks"], route_class=OnceRoute)

Asker = Annotated[Identity, Depends(needs("jobs"))]
_SECRET = "signing_secret"


@router.post("")
def create_endpoint(request: Request, body: WebhookRequest, identity: Asker) -> NewWebhookEndpoint:
    """Have events sent to an address. The answer holds the signing secret, which is shown this once."""
    settings = service_of(request).settings.webhooks
    problem = url_problem(body.url, settings)
    if problem is not None:
        raise ApiError(f"The URL cannot be called: {problem}.", code="invalid_webhook_url", param="url")
    once, most = once_of(request), settings.endpoints_per_tenant
    once.hide(_SECRET)
    webhook = _catalogue(request).webhooks.create(
        identity.tenant_id,
        body.url,
        body.event_types,
        name=body.name,
        webhook_id=once.new_id("wh_"),
        most=most,
    )
    if webhook is None:
        raise ApiError(
            f"You have {most} webhook endpoints, which is the most; delete one that you no longer need.",
            code="too_many_webhook_endpoints",
        )
    # The host alone: paths of such addresses often hold a secret of their own.
    host = urlsplit(webhook.url).hostname
    record(request, identity, "webhook.create", webhook.id, host=host, events=webhook.events)
    return _with_secret(webhook)


@router.get("")
def list_endpoints(
    request: Request, identity: Asker, after: After = None, limit: Limit = 20
) -> Listing[WebhookEndpoint]:
    """The asker's endpoints, the newest first."""
    try:
        page = _catalogue(request).webhooks.list(identity.tenant_id, after=after, limit=limit)
    except NotFoundError:
        raise unknown_cursor("webhook endpoint", after) from None
    return Listing.of([_endpoint(webhook) for webhook in page.items], page.has_more)


@router.get("/{webhook_id}")
def get_endpoint(request: Request, webhook_id: str, identity: Asker) -> WebhookEndpoint:
    """One endpoint."""
    try:
        return _endpoint(_catalogue(request).webhooks.get(identity.tenant_id, webhook_id))
    except NotFoundError:
        raise _unknown(webhook_id) from None


@router.post("/{webhook_id}/rotate_secret")
def rotate_secret(request: Request, webhook_id: str, identity: Asker) -> NewWebhookEndpoint:
    """Sign with a fresh secret from the next try on; the answer holds it, this once."""
    once = once_of(request)
    once.hide(_SECRET)
    try:
        webhook = _catalogue(request).webhooks.rotate_secret(
            identity.tenant_id, webhook_id, key=once.new_bytes(_SECRET)
        )
    except NotFoundError:
        raise _unknown(webhook_id) from None
    record(request, identity, "webhook.rotate_secret", webhook_id)
    return _with_secret(webhook)


@router.delete("/{webhook_id}")
def delete_endpoint(request: Request, webhook_id: str, identity: Asker) -> DeletedWebhookEndpoint:
    """Send nothing more to an address, of what is on its way neither."""
    try:
        _catalogue(request).webhooks.disable(identity.tenant_id, webhook_id)
    except NotFoundError:
        raise _unknown(webhook_id) from None
    record(request, identity, "webhook.delete", webhook_id)
    return DeletedWebhookEndpoint(id=webhook_id)


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


def _unknown(webhook_id: str) -> ApiError:
    return ApiError(f"No such webhook endpoint: {shown(webhook_id)}", 404, "webhook_endpoint_not_found")
