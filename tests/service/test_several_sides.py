"""Two HTTP sides over one database and one store: what was begun through one goes on through the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient

from ot_ray.artifacts import BundleManifest
from ot_ray.store import LocalStore, open_store
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.service import Service
from serve.wire.offsite import SMALLEST_PIECE
from tests.service.clients import new_key
from tests.service.sent_adapters import PLACE


@pytest.fixture
def sides(
    base_backend: Backend, settings: ServeConfig, store: LocalStore, database_url: str
) -> Iterator[list[TestClient]]:
    """A client of each side, with one key."""
    with ExitStack() as opened:
        clients, key = [], None
        for _ in range(2):
            catalogue = Catalogue.open(database_url)
            opened.callback(catalogue.close)
            key = key or new_key(catalogue, "anna")
            api = create_api(Service(base_backend, settings, catalogue, open_store(store.url)))
            clients.append(opened.enter_context(TestClient(api, headers={"authorization": f"Bearer {key}"})))
        yield clients


def test_upload_goes_on_through_the_other_side(
    sides: list[TestClient], released: BundleManifest, store: LocalStore
) -> None:
    one, other = sides
    content = bytes(range(256)) * 3000
    file = {"name": "adapter.safetensors", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"name": "manifest.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    body = {"bundle_id": released.bundle_id, "suffix": "support", "files": [file, manifest]}
    made = one.post(PLACE, json=body)
    assert made.status_code == 200, made.text
    place = f"{PLACE}/{made.json()['id']}"
    ends = [SMALLEST_PIECE, 2 * SMALLEST_PIECE, len(content)]
    for side, start, end in zip((one, other, one), [0, *ends], ends, strict=False):
        url = f"{place}/files/{file['name']}"
        assert other.head(url).headers["upload-offset"] == one.head(url).headers["upload-offset"] == str(start)
        given = {"content-range": f"bytes {start}-{end - 1}/{len(content)}"}
        assert side.put(url, content=content[start:end], headers=given).status_code == 200
    assert other.put(f"{place}/files/{manifest['name']}", content=b"{}").status_code == 200
    assert other.post(f"{place}/complete").json()["state"] == "received"
    assert one.get(place).json()["state"] == "received"
    (key,) = [key for key in store.list("adapters") if key.endswith(file["name"])]
    assert store.read(key) == content


def test_same_request_through_the_other_side_is_answered_as_before(sides: list[TestClient]) -> None:
    form = {"files": {"file": ("a.jsonl", b"{}\n")}, "data": {"purpose": "fine-tune"}}
    answers = [side.post("/v1/files", headers={"idempotency-key": "k-1"}, **form) for side in sides]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert answers[1].headers["idempotency-replayed"] == "true"
    assert len(sides[1].get("/v1/files").json()["data"]) == 1
