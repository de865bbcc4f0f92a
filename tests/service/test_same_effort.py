"""Another tenant's id costs the service just what one costs that never was, so that time tells nobody which it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from ot_ray.artifacts import BundleManifest
from serve.catalogue import Catalogue
from tests.http.tiny_service import BASE
from tests.service.clients import ClientOf

LINES = b'{"prompt": "a", "completion": "b"}\n' * 10
Make = Callable[[TestClient, BundleManifest], str]


def _file(client: TestClient, _: BundleManifest) -> str:
    sent = {"file": ("train.jsonl", LINES)}
    return client.post("/v1/files", data={"purpose": "fine-tune"}, files=sent).json()["id"]


def _job(client: TestClient, bundle: BundleManifest) -> str:
    asked = {"model": BASE, "training_file": _file(client, bundle)}
    return client.post("/v1/fine_tuning/jobs", json=asked).json()["id"]


def _endpoint(client: TestClient, _: BundleManifest) -> str:
    asked = {"url": "https://hooks.example/", "event_types": ["fine_tuning.job.succeeded"]}
    return client.post("/v1/webhook_endpoints", json=asked).json()["id"]


def _adapter(client: TestClient, bundle: BundleManifest) -> str:
    names = ("manifest.json", "adapter.safetensors")
    files = [{"name": name, "bytes": 10, "sha256": "0" * 64} for name in names]
    asked = {"bundle_id": bundle.bundle_id, "suffix": "home", "files": files}
    answer = client.post("/v1/offsite/adapters", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def _session(client: TestClient, _: BundleManifest) -> str:
    return client.post("/v1/cola/sessions", json={"sites": ["*.q_proj"]}).json()["id"]


CALLS: dict[str, tuple[Make, list[tuple[str, str]]]] = {
    "/v1/files": (_file, [("GET", ""), ("GET", "/content"), ("HEAD", "/content"), ("DELETE", "")]),
    "/v1/fine_tuning/jobs": (
        _job,
        [
            ("GET", ""),
            ("GET", "/events"),
            ("GET", "/checkpoints"),
            *[("POST", f"/{verb}") for verb in ("cancel", "pause", "resume")],
        ],
    ),
    "/v1/webhook_endpoints": (_endpoint, [("GET", ""), ("POST", "/rotate_secret"), ("DELETE", "")]),
    "/v1/offsite/adapters": (_adapter, [("GET", ""), ("POST", "/complete"), ("DELETE", "")]),
    "/v1/cola/sessions": (
        _session,
        [
            ("GET", ""),
            ("GET", "/operations/0"),
            ("GET", "/operations/0?wait_s=1"),
            ("GET", "/auxiliary"),
            ("GET", "/gradients/0"),
            ("GET", "/saved/0/files/adapter_config.json"),
            ("PUT", "/auxiliary?number=0&version=0"),
            ("DELETE", ""),
        ],
    ),
}


@pytest.fixture
def statements(catalogue: Catalogue) -> Iterator[list[str]]:
    """What the database is asked, in order, without the values."""
    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        asked.append(statement)

    engine = catalogue._database.engine
    event.listen(engine, "before_cursor_execute", note)
    yield asked
    event.remove(engine, "before_cursor_execute", note)


@pytest.mark.parametrize("place", CALLS)
def test_another_tenants_id_takes_what_nobodys_takes(
    client_of: ClientOf, released: BundleManifest, statements: list[str], place: str
) -> None:
    make, calls = CALLS[place]
    anna, ben = client_of("anna"), client_of("ben")
    own = make(anna, released)
    prefix = own.rstrip("0123456789abcdef")
    for method, path in calls:
        asked: list[list[str]] = []
        for name in (own, prefix + "0" * (len(own) - len(prefix))):
            statements.clear()
            assert ben.request(method, f"{place}/{name}{path}").status_code == 404
            asked.append(list(statements))
        assert asked[0] == asked[1] != []
    # A statement more is seen: the owner's own answer takes other ones.
    statements.clear()
    assert anna.get(f"{place}/{own}").status_code == 200 and statements
