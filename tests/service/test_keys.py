"""Keys over HTTP: who is let in, who is not, in what words, and that secrets are nowhere to be found."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from ot_ray.errors import NotFoundError
from ot_ray.store import LocalStore
from serve.api import create_api
from serve.catalogue import SCOPES, Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.failures import DatabaseUnavailableError
from serve.service import Service
from tests.service.clients import ClientOf, new_key
from tests.service.database_time import let_pass

Open = Callable[[Catalogue], TestClient]
WRONG = [
    "",
    "Bearer",
    "Bearer ",
    "Basic c2stb3QteDo=",
    "Bearer sk-ot-" + "A" * 43,
    "Bearer " + "x" * 5000,
    "bearer\tsk",
    "Bearer ' OR 1=1 --",
    "Bearer sk-ot-\u00e9".encode("latin-1").decode("latin-1"),
]


@pytest.fixture
def opened(base_backend: Backend, settings: ServeConfig, store: LocalStore) -> Iterator[Open]:
    """Replicas of the service over databases of the test's own."""
    with ExitStack() as clients:

        def open_api(catalogue: Catalogue) -> TestClient:
            return clients.enter_context(TestClient(create_api(Service(base_backend, settings, catalogue, store))))

        yield open_api


@pytest.fixture
def replica(opened: Open, any_catalogue: Catalogue) -> TestClient:
    return opened(any_catalogue)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def admin(catalogue: Catalogue) -> dict[str, str]:
    return bearer(new_key(catalogue, "operator", ["admin"]))


@pytest.mark.parametrize("header", WRONG, ids=range(len(WRONG)))
def test_without_a_good_key_nothing_is_told(client_of: ClientOf, header: str) -> None:
    headers = {"authorization": header.encode("latin-1")} if header else {}
    answer = client_of(None).get("/v1/files", headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["code"] in (None, "invalid_api_key")
    secret = header.removeprefix("Bearer ").strip()
    assert not secret or secret == "Bearer" or secret not in error["message"]


def test_the_key_is_looked_at_before_the_body(client_of: ClientOf) -> None:
    document = client_of(None).get("/openapi.json").json()["paths"]
    paths = [re.sub(r"\{[^}]*\}", "x", path) for path, methods in document.items() if "post" in methods]
    assert len(paths) > 8
    for path in paths:
        for asking, status in ((client_of(None), 401), (client_of("anna", ("inference",)), 403)):
            if status == 403 and path.endswith("/completions"):
                continue  # the key's own scope
            for headers in ({}, {"idempotency-key": "k"}):
                sent = {**headers, "content-type": "application/json"}
                answer = asking.post(path, content=b"{not JSON", headers=sent)
                assert answer.status_code == status, (path, headers, answer.text)


def test_a_scope_opens_its_own_routes_only(client_of: ClientOf) -> None:
    routes = {
        "files": "/v1/files",
        "jobs": "/v1/fine_tuning/jobs",
        "offsite": "/v1/offsite/bundles",
        "cola": "/v1/cola/sessions",
        "inference": "/v1/models",
        "admin": "/v1/audit",
    }
    assert set(routes) == set(SCOPES)
    for scope in SCOPES:
        client = client_of("anna", (scope,))
        for needed, path in routes.items():
            answer = client.get(path)
            assert answer.status_code == (200 if needed == scope else 403), (scope, path, answer.text)
            if needed != scope:
                assert answer.json()["error"]["code"] == "insufficient_permissions"


def test_what_was_revoked_is_refused_by_every_replica_at_the_next_request(
    opened: Open, any_catalogue: Catalogue, any_database_url: str
) -> None:
    second = Catalogue.open(any_database_url)
    replicas = [opened(any_catalogue), opened(second)]
    asking = bearer(new_key(any_catalogue, "anna"))
    key = any_catalogue.keys.list().items[0]
    boss = admin(any_catalogue)
    assert [replica.get("/v1/files", headers=asking).status_code for replica in replicas] == [200, 200]
    assert replicas[0].delete(f"/v1/admin/keys/{key.id}", headers=boss).status_code == 200
    for replica in replicas:
        answer = replica.get("/v1/files", headers=asking)
        assert answer.status_code == 401 and "revoked" in answer.json()["error"]["message"]
    second.close()


def test_a_disabled_tenant_is_refused_until_it_is_enabled(replica: TestClient, any_catalogue: Catalogue) -> None:
    asking, boss = bearer(new_key(any_catalogue, "anna")), admin(any_catalogue)
    place = f"/v1/admin/tenants/{any_catalogue.tenants.named('anna').id}"
    assert replica.post(place, headers=boss, json={"disabled": True}).json()["disabled_at"] is not None
    answer = replica.get("/v1/files", headers=asking)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "account_deactivated")
    assert replica.post(place, headers=boss, json={"disabled": False}).json()["disabled_at"] is None
    assert replica.get("/v1/files", headers=asking).status_code == 200


def test_keys_expire_and_rotate_with_an_overlap(opened: Open, any_database_url: str) -> None:
    now = 1_800_000_000
    catalogue = Catalogue.open(any_database_url, lambda: now)
    replica = opened(catalogue)
    boss = admin(catalogue)
    tenant = catalogue.tenants.create("anna")
    body = {"tenant_id": tenant.id, "scopes": ["files"], "expires_days": 10, "name": "laptop"}
    made = replica.post("/v1/admin/keys", headers=boss, json=body).json()
    assert made["expires_at"] == now + 864_000 and made["hint"] == made["secret"][-4:]
    now += 86_400
    rotated = replica.post(f"/v1/admin/keys/{made['id']}/rotate", headers=boss, json={"overlap_seconds": 60}).json()
    assert rotated["id"] != made["id"] and rotated["secret"] != made["secret"]
    assert (rotated["scopes"], rotated["name"], rotated["expires_at"]) == (["files"], "laptop", now + 864_000)

    def status(key: dict[str, str]) -> int:
        return replica.get("/v1/files", headers=bearer(key["secret"])).status_code

    now += 59
    assert (status(made), status(rotated)) == (200, 200)
    now += 1
    assert (status(made), status(rotated)) == (401, 200)
    refused = replica.post(f"/v1/admin/keys/{made['id']}/rotate", headers=boss, json={})
    assert refused.status_code == 400 and "expired" in refused.json()["error"]["message"]
    now += 864_000
    assert status(rotated) == 401
    catalogue.close()


def test_a_key_that_is_rotated_twice_keeps_its_length_of_life(any_database_url: str) -> None:
    now, day = 1_800_000_000, 24 * 3600
    catalogue = Catalogue.open(any_database_url, lambda: now)
    tenant = catalogue.tenants.create("anna").id
    for life in (10 * day, None):
        first = catalogue.keys.create(tenant, ["files"], expires_at=None if life is None else now + life).key
        for _ in range(3):
            now += 60
            again = catalogue.keys.rotate(first.id).key
            assert again.expires_at == (None if life is None else now + life)
        assert catalogue.keys.get(first.id).expires_at == now - 120 + day, "an end that was set is not put off"
    catalogue.close()


def test_after_a_dead_server_one_key_is_made(
    opened: Open, any_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000
    catalogue = Catalogue.open(any_database_url, lambda: now)
    replica, tenant = opened(catalogue), catalogue.tenants.create("anna").id
    boss = admin(catalogue)

    def lost(path: str, **body: object) -> str:
        """The secret that the next server answers with, after one that died with the effect behind it."""
        nonlocal now
        sent = {**boss, "idempotency-key": path}

        def die(*_: object) -> None:
            raise DatabaseUnavailableError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(catalogue.idempotency, "finish", die)
            assert replica.post(path, headers=sent, json=body).status_code == 503
        now += 60
        let_pass(any_database_url, "idempotency.begun_at", 60)
        return replica.post(path, headers=sent, json=body).raise_for_status().json()["secret"]

    made = lost("/v1/admin/keys", tenant_id=tenant, scopes=["files"], expires_days=10)
    (key,) = catalogue.keys.list(tenant).items
    assert replica.get("/v1/files", headers=bearer(made)).status_code == 200
    rotated = lost(f"/v1/admin/keys/{key.id}/rotate", overlap_seconds=3600)
    assert [item.id for item in catalogue.keys.list(tenant).items][1:] == [key.id]
    assert catalogue.keys.get(key.id).expires_at == now - 60 + 3600, "it ends as the first server said"
    assert [replica.get("/v1/files", headers=bearer(one)).status_code for one in (made, rotated)] == [200, 200]
    catalogue.close()


def test_the_operators_routes(replica: TestClient, any_catalogue: Catalogue) -> None:
    boss = admin(any_catalogue)
    made = replica.post("/v1/admin/tenants", headers=boss, json={"name": "anna", "limits": {"running_jobs": 3}})
    tenant = made.json()
    assert made.status_code == 200 and tenant["limits"]["running_jobs"] == 3
    place = f"/v1/admin/tenants/{tenant['id']}"
    changed = replica.post(place, headers=boss, json={"limits": {"queued_jobs": 2}}).json()
    assert (
        changed["limits"] == {**tenant["limits"], "queued_jobs": 2} == replica.get(place, headers=boss).json()["limits"]
    )
    assert [item["name"] for item in replica.get("/v1/admin/tenants", headers=boss).json()["data"]] == [
        "anna",
        "operator",
    ]
    key = {"tenant_id": tenant["id"], "scopes": ["files", "jobs"]}
    ids = [replica.post("/v1/admin/keys", headers=boss, json=key).json()["id"] for _ in range(3)]
    listing = replica.get("/v1/admin/keys", headers=boss, params={"tenant_id": tenant["id"], "limit": 2}).json()
    assert [item["id"] for item in listing["data"]] == ids[:0:-1] and listing["has_more"]
    assert "secret" not in json.dumps(listing)
    assert replica.get(f"/v1/admin/keys/{ids[0]}", headers=boss).json()["scopes"] == ["files", "jobs"]
    for method, path, body, status in (
        ("POST", "/v1/admin/tenants", {"name": "anna"}, 409),
        ("POST", "/v1/admin/tenants", {"name": "a:b"}, 400),
        ("POST", "/v1/admin/keys", {**key, "tenant_id": "ten_x"}, 404),
        ("POST", "/v1/admin/keys", {**key, "scopes": []}, 400),
        ("POST", "/v1/admin/keys", {**key, "scopes": ["root"]}, 400),
        ("POST", "/v1/admin/keys", {**key, "expires_days": 0}, 400),
        ("POST", place, {"limits": {"running_jobs": -1}}, 400),
        ("POST", place, {"limits": {"file_bytes": 2**70}}, 400),
        ("GET", "/v1/admin/tenants/ten_x", None, 404),
        ("GET", "/v1/admin/keys?after=key_x", None, 404),
        ("DELETE", "/v1/admin/keys/key_x", None, 404),
    ):
        answer = replica.request(method, path, headers=boss, json=body)
        assert answer.status_code == status and set(answer.json()) == {"error"}, (path, answer.text)


def test_secrets_are_stored_nowhere(replica: TestClient, any_catalogue: Catalogue, any_database_url: str) -> None:
    boss = {**admin(any_catalogue), "idempotency-key": "one"}
    tenant_id = any_catalogue.tenants.named("operator").id
    made = replica.post("/v1/admin/keys", headers=boss, json={"tenant_id": tenant_id, "scopes": ["files"]}).json()
    replica.get("/v1/files", headers=bearer(made["secret"]))
    engine = sa.create_engine(any_database_url.replace("postgresql://", "postgresql+psycopg://"))
    found = sa.MetaData()
    found.reflect(engine)
    with engine.connect() as connection:
        stored = "\n".join(str(row) for table in found.sorted_tables for row in connection.execute(sa.select(table)))
    engine.dispose()
    assert made["id"] in stored and made["hint"] in stored
    for secret in (made["secret"], boss["authorization"].removeprefix("Bearer ")):
        assert len(secret) == 6 + 43 and secret.removeprefix("sk-ot-") not in stored


def test_the_audit_log_is_the_operators(replica: TestClient, any_catalogue: Catalogue) -> None:
    boss, asking = admin(any_catalogue), bearer(new_key(any_catalogue, "anna"))
    sent = {**boss, "x-request-id": "req-of-the-test"}
    tenant = replica.post("/v1/admin/tenants", headers=sent, json={"name": "bea"}).json()
    replica.post(f"/v1/admin/tenants/{tenant['id']}", headers=boss, json={"disabled": True})
    assert replica.get("/v1/audit", headers=asking).status_code == 403
    listing = replica.get("/v1/audit", headers=boss, params={"limit": 2}).json()
    assert [item["action"] for item in listing["data"]] == ["request.denied", "tenant.change"] and listing["has_more"]
    denied = listing["data"][0]
    assert denied["tenant_id"] == any_catalogue.tenants.named("anna").id and denied["outcome"] == "denied"
    rest = replica.get("/v1/audit", headers=boss, params={"after": listing["last_id"]}).json()
    assert [item["target"] for item in rest["data"]] == [tenant["id"]] and not rest["has_more"]
    assert rest["data"][0]["request_id"] == "req-of-the-test"
    for params, headers in (({"format": "jsonl"}, boss), ({}, {**boss, "accept": "application/jsonl"})):
        streamed = replica.get("/v1/audit", headers=headers, params=params)
        assert streamed.headers["content-type"].startswith("application/jsonl")
        lines = [json.loads(line) for line in streamed.text.splitlines()]
        assert [line["action"] for line in lines] == ["tenant.create", "tenant.change", "request.denied"]
    for after in ("x", "-1", "9" * 40, "\u0663", "12345"):
        assert replica.get("/v1/audit", headers=boss, params={"after": after}).status_code == 404


def test_what_the_audit_log_cannot_take_is_not_done(
    replica: TestClient, any_catalogue: Catalogue, any_database_url: str, store: LocalStore
) -> None:
    """Every change of the database by HTTP, and each has its line in the same transaction."""
    boss = admin(any_catalogue)
    anna = any_catalogue.tenants.create("anna")
    asking = bearer(new_key(any_catalogue, "anna", [*SCOPES]))
    key = any_catalogue.keys.create(anna.id, ["files"]).key
    hook = any_catalogue.webhooks.create(anna.id, "https://hooks.example/", ["fine_tuning.job.failed"])
    asked = {"model": "tiny", "bundle": {}, "training_file": "file-0", "seed": 0, "hyperparameters": {}}
    asked["method"] = {"tuning_method": "full"}
    waits = any_catalogue.jobs.create(anna.id, **asked)  # type: ignore[arg-type]
    assert hook is not None and waits is not None
    url, job, quiet = "https://hooks.example/b", waits.id, TestClient(replica.app, raise_server_exceptions=False)
    changes: list[tuple[dict[str, str], str, str, dict[str, Any] | None]] = [
        (boss, "POST", "/v1/admin/tenants", {"name": "bea"}),
        (boss, "POST", f"/v1/admin/tenants/{anna.id}", {"disabled": True, "limits": {"queued_jobs": 3}}),
        (boss, "POST", "/v1/admin/keys", {"tenant_id": anna.id, "scopes": ["files"]}),
        (boss, "POST", f"/v1/admin/keys/{key.id}/rotate", {"overlap_seconds": 60}),
        (boss, "DELETE", f"/v1/admin/keys/{key.id}", None),
        (asking, "POST", "/v1/webhook_endpoints", {"url": url, "event_types": ["fine_tuning.job.failed"]}),
        (asking, "POST", f"/v1/webhook_endpoints/{hook.id}", {"url": url}),
        (asking, "POST", f"/v1/webhook_endpoints/{hook.id}/rotate_secret", {}),
        (asking, "DELETE", f"/v1/webhook_endpoints/{hook.id}", None),
        (asking, "POST", f"/v1/fine_tuning/jobs/{job}/pause", None),
        (asking, "POST", f"/v1/fine_tuning/jobs/{job}/cancel", None),
    ]
    engine = sa.create_engine(any_database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE audit RENAME TO audit_elsewhere"))
    engine.dispose()
    upload: dict[str, Any] = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "fine-tune"}}
    assert quiet.post("/v1/files", headers=asking, **upload).status_code >= 500
    for headers, method, path, body in changes:
        answer = quiet.request(method, path, headers=headers, json=body)
        assert answer.status_code >= 500, (path, answer.text)
    assert any_catalogue.tenants.named("anna") == anna and any_catalogue.keys.get(key.id) == key
    with pytest.raises(NotFoundError):
        any_catalogue.tenants.named("bea")
    assert any_catalogue.webhooks.list(anna.id).items == [hook] and any_catalogue.jobs.find(job) == waits
    assert len(any_catalogue.keys.list(anna.id).items) == 2
    assert any_catalogue.files.list(anna.id).items == [] and list(store.list()) == []
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE audit_elsewhere RENAME TO audit"))
    engine.dispose()
    file_id = replica.post("/v1/files", headers=asking, **upload).json()["id"]
    changes.append((asking, "DELETE", f"/v1/files/{file_id}", None))
    # The tenant's own first, before its account is disabled.
    for headers, method, path, body in sorted(changes, key=lambda change: change[0] is boss):
        answer = replica.request(method, path, headers=headers, json=body)
        assert answer.status_code == 200, (path, answer.text)
    assert Counter(line.action for line in any_catalogue.audit.walk()) == Counter(
        {
            "tenant.create": 1,
            "tenant.change": 1,
            "file.create": 1,
            "file.delete": 1,
            "key.create": 1,
            "key.rotate": 1,
            "key.revoke": 1,
            "webhook.create": 1,
            "webhook.update": 1,
            "webhook.rotate_secret": 1,
            "webhook.delete": 1,
            "job.pause": 1,
            "job.cancel": 1,
        }
    )


def test_the_document_says_that_a_key_is_needed(client_of: ClientOf) -> None:
    document = client_of(None).get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        if path.startswith("/v1/"):
            assert all(operation["security"] == [{"api_key": []}] for operation in methods.values()), path


def test_a_database_that_is_gone_is_a_503(opened: Open, tmp_path: Path, sqlite_url: str) -> None:
    catalogue = Catalogue.open(sqlite_url)
    asking = bearer(new_key(catalogue, "anna"))
    catalogue.close()
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    for part in file.parent.glob(f"{file.name}*"):
        part.rename(tmp_path / f"away-{part.name}")
    file.mkdir()
    answer = opened(catalogue).get("/v1/files", headers=asking)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["message"] == "The service's database does not answer at the moment; try again."
