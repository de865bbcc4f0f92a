"""Clients of a service in this process, each with a key of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from fastapi.testclient import TestClient

from ot_ray.errors import NotFoundError
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.service import Service

ALL_SCOPES = ("files", "jobs", "inference", "offsite", "cola")
ClientOf = Callable[..., TestClient]


def new_key(catalogue: Catalogue, tenant: str, scopes: Sequence[str] = ALL_SCOPES) -> str:
    """The secret of a new key of a tenant, who is made if new."""
    try:
        owner = catalogue.tenants.named(tenant)
    except NotFoundError:
        owner = catalogue.tenants.create(tenant)
    return catalogue.keys.create(owner.id, scopes, name="test")[1]


def clients(service: Service) -> Iterator[ClientOf]:
    """Clients of one service, closed at the end."""
    api = create_api(service)
    with ExitStack() as open_clients:

        def client_of(tenant: str | None, scopes: Sequence[str] = ALL_SCOPES) -> TestClient:
            headers = {}
            if tenant is not None:
                assert service.catalogue is not None
                headers["authorization"] = f"Bearer {new_key(service.catalogue, tenant, scopes)}"
            return open_clients.enter_context(TestClient(api, headers=headers))

        yield client_of
