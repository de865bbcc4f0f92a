"""The HTTP application: routes by resource, and every error in OpenAI's body.

Knows a `Service` and nothing of Ray, so that it runs the same under any ASGI server."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ot_ray.errors import OTRayError
from serve.documentation import document
from serve.failures import ApiError, api_error
from serve.middleware import BodyLimit, RequestId, Upload
from serve.routes import (
    audit,
    chat,
    completions,
    files,
    fine_tuning,
    gradient_files,
    gradient_operations,
    gradients,
    health,
    keys,
    models,
    offsite,
    offsite_adapters,
    webhooks,
)
from serve.routes.gradient_uploads import HEADER_ROOM
from serve.routes.uploads import ROOM
from serve.service import Service

_log = logging.getLogger(__name__)

_FILES, _PIECES = re.compile(r"/v1/files"), re.compile(r"/v1/offsite/adapters/[^/]+/files/[^/]+")
_OPEN = (models, completions, chat, health)
_OF_TENANTS = (files, fine_tuning, offsite_adapters, offsite, webhooks, keys, audit)
_GRADIENTS = (gradients, gradient_operations, gradient_files)
_AUXILIARIES = re.compile(r"/v1/cola/sessions/[^/]+/auxiliary")


def create_api(service: Service, *, answer_request_id: bool = True) -> FastAPI:
    """Build the application.

    Args:
        answer_request_id: put `x-request-id` on answers; off where the server in front already does.
    """
    api = FastAPI(title="Offsite tuning", docs_url=None, redoc_url=None)
    api.state.service = service
    for resource in _resources(service):
        api.include_router(resource.router)
    document(api, keys=service.catalogue is not None)
    api.add_exception_handler(RequestValidationError, _on_invalid)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(OTRayError, _on_error)
    settings = service.settings
    uploads = [
        Upload("POST", _FILES, settings.files.max_bytes + ROOM),
        Upload("PUT", _PIECES, settings.offsite.piece_bytes),
    ]
    if settings.gradients is not None:
        uploads.append(Upload("PUT", _AUXILIARIES, settings.gradients.max_auxiliary_bytes + HEADER_ROOM))
    api.add_middleware(BodyLimit, limit=settings.max_body_bytes, uploads=uploads, patience=settings.patience)
    api.add_middleware(RequestId, answer=answer_request_id)
    return api


def _resources(service: Service) -> tuple[ModuleType, ...]:
    if service.catalogue is None:
        return _OPEN
    of_tenants = (*_OPEN, *_OF_TENANTS)
    return of_tenants if service.settings.gradients is None else (*of_tenants, *_GRADIENTS)


def _answer(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.body, error.status, {**(headers or {}), **error.headers})


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    told = api_error(error)
    if told.status == 500:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(told)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return _answer(ApiError(f"Unknown request URL: {place}. Please check the URL for typos.", 404, "unknown_url"))
    if error.status_code == 405:
        told = ApiError(
            f"Not allowed to {place}; use {headers.get('Allow', 'another method')}.", 405, "method_not_supported"
        )
        return _answer(told, headers)
    return _answer(ApiError(str(error.detail), error.status_code), headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(_explain(error.errors()))


def _explain(problems: Sequence[Any]) -> ApiError:
    """The first problem of an invalid body, in OpenAI's words; unknown arguments are told all at once."""
    unknown = [_field(item) for item in problems if item["type"] == "extra_forbidden"]
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        return ApiError(f"Unrecognized request argument{plural} supplied: {', '.join(unknown)}", param=unknown[0])
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError("The request body is not valid JSON; send one JSON object.")
    field = _field(first)
    if not field:
        return ApiError("The request body must be a JSON object, sent with content-type: application/json.")
    if first["type"] == "missing":
        return ApiError(f"Missing required parameter: '{field}'.", code="missing_required_parameter", param=field)
    sent = repr(first["input"])
    shown = sent if len(sent) <= 80 else f"{sent[:77]}..."
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(f"Invalid value for '{field}': {reason} (you sent {shown}).", param=field.split(".")[0])


def _field(problem: Any) -> str:
    return ".".join(str(part) for part in problem["loc"][1:])
