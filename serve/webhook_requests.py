"""One webhook as a request: signed as Standard Webhooks asks, and sent once.

When, how often, and what follows from the answer is the caller's; the connection is outbound.py's."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import TYPE_CHECKING, Any

from serve.outbound import Resolver, post, resolve
from serve.wire.webhooks import WebhookConfig

if TYPE_CHECKING:
    from serve.catalogue.records import Webhook

_PREFIX = "whsec_"


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """One entry of the `webhook-signature` header: `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`.

    Args:
        secret: `whsec_` and the key's base64.
    """
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def send(
    webhook: Webhook, payload: dict[str, Any], now: float, config: WebhookConfig, resolver: Resolver = resolve
) -> int:
    """Post an event to an endpoint and return the status of the answer.

    It is signed with the endpoint's secret, and with the one before for as long as that holds.

    Args:
        payload: the event; its id is the request's `webhook-id`.
        now: seconds since 1970.

    Raises:
        OutboundError: the address may not be called, or nothing there answers.
    """
    body = json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode()
    timestamp = int(now)
    headers = {
        "content-type": "application/json",
        "user-agent": "ot_ray-webhooks/1",
        "webhook-id": payload["id"],
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(
            signature(secret, payload["id"], timestamp, body) for secret in webhook.secrets_at(timestamp)
        ),
    }
    return post(webhook.url, headers, body, config, resolver)
