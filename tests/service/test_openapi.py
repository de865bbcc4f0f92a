"""The OpenAPI document says what the service does, and the page that shows it needs nobody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from ot_ray.store import LocalStore
from serve.api import create_api
from serve.config import ServeConfig
from serve.documentation.examples import EXAMPLES
from serve.engine.backend import Backend
from serve.service import Service
from tests.service.clients import ALL_SCOPES, ClientOf


@pytest.fixture
def client(client_of: ClientOf) -> TestClient:
    return client_of("anna", (*ALL_SCOPES, "admin"))


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    return client.get("/openapi.json", headers={"authorization": ""}).json()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def conforms(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_document_is_openapi_with_short_unique_ids(document: dict[str, Any]) -> None:
    validate(document)
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z]+(_[a-z]+){0,2}", name) for name in ids), ids
    assert {"create_file", "create_job", "chat", "complete", "create_adapter", "healthz"} <= set(ids)
    assert all(operation["tags"] for _, _, operation in operations(document))


def test_every_operation_has_openais_errors_and_asks_for_a_key(document: dict[str, Any]) -> None:
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    for path, _, operation in operations(document):
        assert operation.get("security") == (None if path == "/healthz" else [{"api_key": []}]), path
        errors = {status: answer for status, answer in operation["responses"].items() if status[0] in "45"}
        assert {"4XX", "5XX"} <= errors.keys() and "422" not in errors
        for answer in errors.values():
            assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()


def test_summaries_are_sentences_without_a_full_stop(document: dict[str, Any]) -> None:
    told = {operation["operationId"]: operation["summary"] for _, _, operation in operations(document)}
    assert all(re.fullmatch(r"[A-Z][a-z]+( [a-z][a-z',-]*)*", summary) for summary in told.values()), told
    assert all(summary.lower() != name.replace("_", " ") or name.startswith("list_") for name, summary in told.items())


def test_every_json_body_has_an_example_of_its_shape(document: dict[str, Any]) -> None:
    bodies = {
        operation["operationId"]: content["application/json"]
        for _, _, operation in operations(document)
        if "application/json" in (content := operation.get("requestBody", {}).get("content", {}))
    }
    assert bodies.keys() == EXAMPLES.keys()
    for body in bodies.values():
        conforms(document, body["schema"], body["example"])


def test_uploads_and_streams_are_described(document: dict[str, Any]) -> None:
    body = document["paths"]["/v1/files"]["post"]["requestBody"]
    form = body["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "purpose"] and form["properties"]["file"]["format"] == "binary"
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert answers.keys() == {"application/json", "text/event-stream"}
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert {"type": "string"} in prompt["anyOf"]


@pytest.mark.parametrize(
    ("method", "path", "sent", "status"),
    [
        ("GET", "/v1/models/none", {}, 404),
        ("GET", "/v1/nothing", {}, 404),
        ("PATCH", "/v1/models", {}, 405),
        ("POST", "/v1/completions", {"json": {"model": 1}}, 400),
        ("POST", "/v1/completions", {"content": b"{"}, 400),
        ("GET", "/v1/models", {"headers": {"authorization": "Bearer sk-ot-unknown"}}, 401),
        ("GET", "/v1/files?limit=0", {}, 400),
    ],
)
def test_errors_are_those_of_the_document(
    client: TestClient, document: dict[str, Any], method: str, path: str, sent: dict[str, Any], status: int
) -> None:
    answer = client.request(method, path, **sent)
    assert answer.status_code == status
    conforms(document, {"$ref": "#/components/schemas/Error"}, answer.json())


def test_page_loads_nothing_from_elsewhere(client_of: ClientOf) -> None:
    anybody = client_of(None)
    page = anybody.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(loaded) == ["docs/page.css", "docs/page.js", "openapi.json"]
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        part = anybody.get(f"/docs/{name}")
        assert part.status_code == 200 and part.headers["content-type"].startswith(kind)
        assert "//" not in part.text.replace("// ", "") and "innerHTML" not in part.text


def test_a_service_without_tenants_describes_what_it_has(
    base_backend: Backend, settings: ServeConfig, store: LocalStore
) -> None:
    with TestClient(create_api(Service(base_backend, settings.model_copy(update={"database": None})))) as client:
        document = client.get("/openapi.json").json()
    validate(document)
    assert document["paths"].keys() == {
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/completions",
        "/v1/chat/completions",
        "/healthz",
    }
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation for _, _, operation in operations(document))
