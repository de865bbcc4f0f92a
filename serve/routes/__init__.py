"""One module a resource, each with a `router`; what they share is where the service is found."""

from __future__ import annotations

from fastapi import Request

from serve.engine.backend import Backend
from serve.service import Service


def service_of(request: Request) -> Service:
    """The service that the application was built over."""
    return request.app.state.service


def backend_of(request: Request) -> Backend:
    """Its engines."""
    return service_of(request).backend
