"""Delivers what the database says is due, and tries it again until it is taken.

That an event is due is written in the transaction that ends its job; the request itself is webhook_requests.py's."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from serve.catalogue import Catalogue
from serve.catalogue.records import Delivery, Webhook
from serve.outbound import OutboundError, Resolver, resolve, trust
from serve.webhook_requests import send
from serve.wire.webhooks import WebhookConfig

_log = logging.getLogger(__name__)


def pause_s(config: WebhookConfig, attempts: int) -> float:
    """Seconds between the try number `attempts` and the next: doubling, up to the longest."""
    return min(config.first_retry_s * 2.0 ** min(attempts - 1, 60), config.longest_retry_s)


class Deliverer:
    """Hands deliveries to threads, one at a time for each endpoint and half of the threads at most for each tenant,
    so that an endpoint that hangs holds up nobody else's.

    Several deliverers may work on one database: a delivery is claimed before it is tried. One that is killed in the
    middle is tried again under the same `webhook-id`, so that events arrive at least once.

    Raises:
        ConfigError: `ca_file` cannot be read.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        config: WebhookConfig,
        *,
        clock: Callable[[], float] = time.time,
        resolver: Resolver = resolve,
    ) -> None:
        self._catalogue, self._config, self._clock, self._resolver = catalogue, config, clock, resolver
        trust(config.ca_file)
        self._threads = ThreadPoolExecutor(config.concurrent, thread_name_prefix="webhooks")
        self._lock = threading.Lock()
        self._under_way: dict[str, tuple[str, Future[None]]] = {}
        """By endpoint: its tenant, and what is being done."""

    def run_due(self, now: float) -> int:
        """Begin the deliveries that are due, and return how many; does not wait for answers."""
        begun = 0
        hold_until = int(now + 2 * self._config.timeout_s) + 60
        for delivery, webhook in self._catalogue.webhooks.due(int(now)):
            if not self._has_room(webhook):
                continue
            attempt = self._catalogue.webhooks.claim(delivery, hold_until)
            if attempt is None:
                continue
            with self._lock:
                future = self._threads.submit(self._deliver, delivery, webhook, attempt)
                self._under_way[webhook.id] = webhook.tenant_id, future
            begun += 1
        return begun

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the deliveries that were begun; whether all are done."""
        with self._lock:
            futures = [future for _, future in self._under_way.values()]
        return not wait(futures, timeout_s).not_done

    def sweep(self) -> None:
        """Forget deliveries that were settled long ago, and secrets and endpoints that nobody needs any more."""
        self._catalogue.webhooks.sweep(int(self._config.keep_s))

    def close(self) -> None:
        """Wait for the deliveries that were begun, and begin no more."""
        self._threads.shutdown(wait=True)

    def _has_room(self, webhook: Webhook) -> bool:
        with self._lock:
            self._under_way = {key: item for key, item in self._under_way.items() if not item[1].done()}
            tenants = Counter(tenant for tenant, _ in self._under_way.values())
            most = max(1, self._config.concurrent // 2)
            full = len(self._under_way) >= self._config.concurrent or tenants[webhook.tenant_id] >= most
            return not full and webhook.id not in self._under_way

    def _deliver(self, delivery: Delivery, webhook: Webhook, attempt: int) -> None:
        try:
            error = self._try(delivery, webhook)
            if error is None:
                self._catalogue.webhooks.delivered(delivery.id, attempt)
                return
            again = self._clock() + pause_s(self._config, attempt)
            last = again > delivery.created_at + self._config.give_up_s
            self._catalogue.webhooks.not_delivered(delivery.id, attempt, None if last else int(again), error)
        except Exception:
            # The claim runs out by itself, and then the delivery is tried again.
            _log.exception("delivery %s stays open", delivery.id)

    def _try(self, delivery: Delivery, webhook: Webhook) -> str | None:
        """Why the endpoint did not take it; None if it did."""
        try:
            status = send(webhook, delivery.payload, self._clock(), self._config, self._resolver)
        except OutboundError as error:
            return str(error)
        except Exception:
            _log.exception("delivery %s could not be tried", delivery.id)
            return "the service failed to send it"
        return None if 200 <= status < 300 else f"answered {status}"
