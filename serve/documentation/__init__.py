"""The service's OpenAPI document at `/openapi.json`, and interactive docs at `/docs` that load nothing from elsewhere.

Parameters and bodies come from the routes' own types; what types cannot say is added here."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from serve.documentation.examples import EXAMPLES

_FOLDER = Path(__file__).parent
_PAGE = {"docs": "page.html", "docs/page.js": "page.js", "docs/page.css": "page.css"}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# The page runs its own script alone and talks to this service alone; nobody else's page shows it in a frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_METHODS = frozenset({"get", "put", "post", "delete", "head", "patch"})
_TAGS = {"/v1/completions": "Completions", "/v1/chat/completions": "Chat", "/healthz": "Health"}
# Bodies of a second kind, and those that a route makes by itself.
_CONTENT = {
    "complete": "text/event-stream",
    "chat": "text/event-stream",
    "list_audit": "application/jsonl",
    "get_content": "application/octet-stream",
}
_OPEN_TO_ALL = frozenset({"/healthz"})
_DESCRIPTION = """Offsite tuning as a service. Files, fine-tuning jobs, models and completions speak OpenAI's wire
format; `/v1/offsite` hands bundles out and takes adapters back; `/v1/cola` is gradient learning. Every error has the
body `Error`. Answers to 408, 429, 500 and 503 may be tried again, after `retry-after` seconds where that is given;
`x-should-retry: false` says where another try is pointless. `x-request-id` names a request in the service's log."""
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What is wrong, and the way out."},
                "type": {"type": "string", "enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": {"type": ["string", "null"], "description": "For programs to act on."},
            },
            "additionalProperties": False,
        }
    },
    "additionalProperties": False,
}
_ONCE = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same POST again under the same key is answered as before and has no second effect.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_KEY = {"type": "http", "scheme": "bearer", "description": "A key of the tenant's, `sk-ot-...`."}


def document(api: FastAPI, *, keys: bool) -> None:
    """Give an application its document and the page that shows it; call it when every route is there.

    Args:
        keys: whether requests need a key.
    """
    api.openapi = partial(_described, api, keys)  # type: ignore[method-assign]
    router = APIRouter(include_in_schema=False)
    for path, name in _PAGE.items():
        file = _FOLDER / name
        router.add_api_route(f"/{path}", partial(_send, file.read_bytes(), _TYPES[file.suffix]), methods=["GET"])
    api.include_router(router)


def _send(data: bytes, media_type: str) -> Response:
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
    return Response(data, media_type=media_type, headers=headers)


def _described(api: FastAPI, keys: bool) -> dict[str, Any]:
    if api.openapi_schema is None:
        made = get_openapi(title=api.title, version=api.version, description=_DESCRIPTION, routes=api.routes)
        api.openapi_schema = _completed(made, keys)
    return api.openapi_schema


def _completed(made: dict[str, Any], keys: bool) -> dict[str, Any]:
    """Put in what every operation shares: errors, the key, and an example of each body."""
    parts = made.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    # FastAPI's own shape of errors, which no answer of this service has.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = copy.deepcopy(_ERROR)
    parts.pop("securitySchemes", None)
    if keys:
        parts["securitySchemes"] = {"api_key": copy.deepcopy(_KEY)}
    for path, operations in made["paths"].items():
        for method in sorted(_METHODS & operations.keys()):
            operation = operations[method]
            # FastAPI puts path and method behind the function's name, which is unique here, and what clients want.
            ending = re.sub(r"\W", "_", path) + f"_{method}"
            operation["operationId"] = operation["operationId"].removesuffix(ending)
            operation.setdefault("tags", [_TAGS.get(path, "Models")])
            if keys and method == "post":
                operation.setdefault("parameters", []).append(copy.deepcopy(_ONCE))
            _complete(operation, secured=keys and path not in _OPEN_TO_ALL)
    return made


def _complete(operation: dict[str, Any], secured: bool) -> None:
    responses = operation["responses"]
    media = _CONTENT.get(operation["operationId"])
    if media is not None:
        responses["200"].setdefault("content", {}).setdefault(media, {"schema": {"type": "string"}})
    responses.pop("422", None)
    error = {"$ref": "#/components/schemas/Error"}
    for status, said in (("4XX", "The request cannot be answered."), ("5XX", "The service failed; try again.")):
        responses[status] = {"description": said}
    for status in [status for status in responses if status[0] in "45"]:
        responses[status].setdefault("content", {"application/json": {"schema": error}})
    operation.pop("security", None)
    if secured:
        operation["security"] = [{"api_key": []}]
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        example = EXAMPLES.get(operation["operationId"])
        if media == "application/json" and example is not None:
            body["example"] = copy.deepcopy(example)
