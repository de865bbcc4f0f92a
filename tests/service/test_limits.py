"""Requests a minute: counted for a tenant over all its keys and all replicas, and for nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient

from ot_ray.store import LocalStore
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.service import Service
from tests.service.clients import new_key

MINUTE = 1_800_000_000  # begins a minute


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = float(MINUTE)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalogues(any_database_url: str, clock: Clock) -> Iterator[list[Catalogue]]:
    """Two replicas' views of one database."""
    opened = [Catalogue.open(any_database_url, clock) for _ in range(2)]
    yield opened
    for catalogue in opened:
        catalogue.close()


@pytest.fixture
def replicas(
    catalogues: list[Catalogue], base_backend: Backend, settings: ServeConfig, store: LocalStore
) -> Iterator[list[TestClient]]:
    with ExitStack() as clients:
        services = [Service(base_backend, settings, catalogue, store) for catalogue in catalogues]
        yield [clients.enter_context(TestClient(create_api(service))) for service in services]


def test_requests_beyond_the_limit_wait_for_the_next_minute(
    catalogues: list[Catalogue], replicas: list[TestClient], clock: Clock
) -> None:
    first, second, other = (
        {"authorization": f"Bearer {new_key(catalogues[0], tenant)}"} for tenant in ("anna", "anna", "bea")
    )
    anna = catalogues[0].tenants.named("anna")
    catalogues[0].tenants.change_limits(anna.id, {"requests_per_minute": 4})
    clock.now += 15
    for replica in replicas:
        for headers in (first, second):
            assert replica.get("/v1/files", headers=headers).status_code == 200
    for replica in replicas:
        refused = replica.get("/v1/files", headers=first)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "45"
        assert "x-should-retry" not in refused.headers
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert replica.get("/v1/files", headers=other).status_code == 200
    clock.now += 45
    assert replicas[1].get("/v1/files", headers=first).status_code == 200
    catalogues[0].tenants.change_limits(anna.id, {"requests_per_minute": 0})
    assert replicas[1].get("/v1/files", headers=first).status_code == 429


def test_a_request_is_counted_once(catalogues: list[Catalogue], replicas: list[TestClient]) -> None:
    asking = {"authorization": f"Bearer {new_key(catalogues[0], 'boss', ['admin'])}", "idempotency-key": "a"}
    assert replicas[0].post("/v1/admin/tenants", headers=asking, json={"name": "anna"}).status_code == 200
    count, seconds = catalogues[0].counts.request(catalogues[0].tenants.named("boss").id)
    assert (count, seconds) == (2, 60)


def test_wrong_keys_count_for_nobody(catalogues: list[Catalogue], replicas: list[TestClient]) -> None:
    new_key(catalogues[0], "anna")
    for secret in ("sk-ot-x", ""):
        assert replicas[0].get("/v1/files", headers={"authorization": f"Bearer {secret}"}).status_code == 401
    assert catalogues[0].counts.request(catalogues[0].tenants.named("anna").id)[0] == 1


def test_old_windows_are_forgotten(catalogues: list[Catalogue], clock: Clock) -> None:
    tenant = catalogues[0].tenants.create("anna")
    catalogues[0].counts.request(tenant.id)
    catalogues[0].counts.take_tokens(tenant.id, 5, 10)
    clock.now += 60
    catalogues[0].counts.sweep()
    assert catalogues[0].counts.tokens_left(tenant.id, 10)[0] == 5
    clock.now -= 60
    assert catalogues[0].counts.request(tenant.id)[0] == 2, "a window that just ended is kept"
    clock.now += 40 * 86400
    catalogues[0].counts.sweep()
    clock.now -= 40 * 86400
    assert catalogues[0].counts.tokens_left(tenant.id, 10)[0] == 10
    assert catalogues[0].counts.request(tenant.id)[0] == 1
