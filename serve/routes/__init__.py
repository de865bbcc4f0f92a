"""One module a resource, each with a `router`; what they share is where the backend is found."""

from __future__ import annotations

from fastapi import Request

from serve.engine.backend import Backend


def backend_of(request: Request) -> Backend:
    """The backend that the application was built over."""
    return request.app.state.backend
