"""Requests by the thousand, made from the service's own OpenAPI document: no 5xx, and answers that conform to it.

Right and wrong ones alternate; many name things that exist. A second tenant must not notice any of it."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.python.asgi import get_client
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ot_ray.artifacts import BundleManifest
from serve.api import create_api
from serve.service import Service
from tests.http.tiny_service import BASE
from tests.service.clients import ALL_SCOPES, ClientOf, new_key

LINE = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
TAGS = ("Admin", "Chat", "Completions", "Files", "Fine-tuning", "Models", "Offsite", "Webhooks")
EXAMPLES = 40
"""Requests of each operation that are right, and as many that are wrong."""
# Those that end what they name would leave nothing for the others to meet.
ENDING = ("DELETE",)


@dataclass
class Scene:
    """A tenant whose key asks, things of it that exist, and what was answered."""

    api: FastAPI
    key: str
    known: dict[str, str]
    ben: TestClient
    service: Service
    answered: Counter[int] = field(default_factory=Counter)

    def seen_by_ben(self) -> list[Any]:
        places = ("files", "fine_tuning/jobs", "webhook_endpoints", "offsite/adapters", "offsite/bundles")
        return [self.ben.get(f"/v1/{place}").json() for place in places]

    def files(self) -> tuple[list[str], list[str]]:
        """Where the store holds files, and where the database says so."""
        catalogue, store = self.service.catalogue, self.service.store
        assert catalogue is not None and store is not None
        rows = []
        for tenant in catalogue.tenants.list():
            page = catalogue.files.list(tenant.id, after=None, limit=10_000, order="desc", purpose=None)
            rows += [f"files/{tenant.id}/{file.id}" for file in page.items]
        return sorted(store.list("files")), sorted(rows)


@pytest.fixture
def scene(service: Service, released: BundleManifest, client_of: ClientOf) -> Scene:
    catalogue = service.catalogue
    assert catalogue is not None
    anna, ben = client_of("anna", (*ALL_SCOPES, "admin")), client_of("ben")
    for tenant in catalogue.tenants.list():
        catalogue.tenants.change_limits(tenant.id, {"requests_per_minute": 10**6, "queued_jobs": 1000})
    known: dict[str, str] = {"model": BASE, "model_id": BASE, "bundle": released.bundle_id, "name": "config.json"}
    known["bundle_id"] = released.bundle_id
    for client in (ben, anna):
        file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", LINE * 10)}).json()
        asked = {"model": BASE, "training_file": file["id"]}
        job = client.post("/v1/fine_tuning/jobs", json=asked).json()
        hook = {"url": "https://example.com/", "event_types": ["fine_tuning.job.failed"]}
        webhook = client.post("/v1/webhook_endpoints", json=hook).json()
        known |= {"file_id": file["id"], "training_file": file["id"], "job_id": job["id"], "webhook_id": webhook["id"]}
    # Neither the key that asks nor its tenant.
    other = catalogue.tenants.create("carl")
    known |= {"tenant_id": other.id, "key_id": catalogue.keys.create(other.id, ("files",))[0].id}
    return Scene(create_api(service), new_key(catalogue, "anna", (*ALL_SCOPES, "admin")), known, ben, service)


def operations(scene: Scene, tag: str) -> list[Any]:
    document = schemathesis.openapi.from_asgi("/openapi.json", scene.api)
    found = [item.ok() for item in document.get_all_operations()]
    # Of `/healthz` there is one request only, which others make.
    assert {name for operation in found for name in operation.tags} == {*TAGS, "Health"}
    return [operation for operation in found if tag in operation.tags]


@pytest.mark.parametrize("tag", TAGS)
def test_no_request_breaks_the_service(scene: Scene, tag: str) -> None:
    before = scene.seen_by_ben()
    with get_client(scene.api) as session:
        for operation in operations(scene, tag):
            for mode in GenerationMode:
                ask(scene, session, operation.as_strategy(generation_mode=mode))
    assert scene.seen_by_ben() == before
    refused = sum(count for status, count in scene.answered.items() if status // 100 == 4)
    assert scene.answered[200] > 0 and refused > EXAMPLES
    stored, known = scene.files()
    assert stored == known


def ask(scene: Scene, session: Any, cases: Any) -> None:
    """Send what a strategy makes; an answer that does not conform fails the test, with the request in its message."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def send(case: schemathesis.Case) -> None:
        name_what_exists(case, scene.known)
        response = case.call(session=session, headers={"authorization": f"Bearer {scene.key}"})
        scene.answered[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    send()


def name_what_exists(case: schemathesis.Case, known: dict[str, str]) -> None:
    """Have every second id of a path, and every third of a body, name something that is there."""
    if case.method not in ENDING:
        for name, value in (case.path_parameters or {}).items():
            if name in known and zlib.crc32(repr(value).encode()) % 2:
                case.path_parameters[name] = known[name]
    if isinstance(case.body, dict) and zlib.crc32(repr(case.body).encode()) % 3 == 0:
        for name in case.body.keys() & known.keys():
            case.body[name] = known[name]
            if "messages" in case.body or "prompt" in case.body:
                # Text that nobody reads.
                case.body["max_tokens"] = 2
