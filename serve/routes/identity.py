"""Who asks: the key of a request, what it may do, how often, and the line it leaves in the audit log.

Keys and tenants are made in routes/keys.py and serve/admin.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serve.catalogue import Catalogue, TenantLimits
from serve.catalogue.audit import Note
from serve.catalogue.records import Scope
from serve.failures import ApiError
from serve.routes import service_of

_log = logging.getLogger(__name__)
_MOST_CHARACTERS = 200
_SCOPE = "needed_scope"
_NO_KEY = (
    "You didn't provide an API key. Provide it in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)
_REFUSALS = {
    "revoked": ("This API key was revoked; use another, or ask the operator for a new one.", "invalid_api_key"),
    "expired": ("This API key has expired; use another, or ask the operator for a new one.", "invalid_api_key"),
    "disabled": ("This account is disabled; ask the operator.", "account_deactivated"),
}

# Shown in the OpenAPI document; the header itself is read by `identify`.
_bearer = HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key: `Bearer sk-ot-...`")


@dataclass(frozen=True)
class Identity:
    """The tenant whose key a request came with; of a service without tenants, nobody in particular."""

    tenant_id: str
    tenant: str
    key_id: str
    scopes: frozenset[str]
    limits: TenantLimits


_ANYBODY = Identity("", "", "", frozenset({"inference"}), TenantLimits())


def needs(scope: Scope) -> Callable[..., Identity]:
    """A dependency that gives the Identity of a request whose key has a scope, and refuses all others.

    Answers 401 without a good key, 403 without the scope, 429 beyond the tenant's requests a minute."""

    def dependency(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Identity:
        return authorize(request, scope)

    setattr(dependency, _SCOPE, scope)
    return dependency


def scope_of(dependency: object) -> Scope | None:
    """The scope that a dependency made by `needs` asks for; None of any other."""
    return getattr(dependency, _SCOPE, None)


def authorize(request: Request, scope: Scope) -> Identity:
    """Whose key a request came with. Raises ApiError, 401, 403 or 429, as `needs` says."""
    identity = identify(request)
    if scope not in identity.scopes:
        record(request, identity, "request.denied", request.url.path, outcome="denied", scope=scope)
        raise ApiError(
            f"You have insufficient permissions for this operation. Missing scopes: {scope}. Use another key.",
            403,
            "insufficient_permissions",
        )
    return identity


def identify(request: Request) -> Identity:
    """Whose key a request came with, counted once against the tenant's requests a minute.

    The database is asked each time, so that a key which was revoked is refused from then on by every replica."""
    known = getattr(request.state, "identity", None)
    if known is not None:
        return known
    catalogue = service_of(request).catalogue
    request.state.identity = _ANYBODY if catalogue is None else _authenticate(request, catalogue)
    return request.state.identity


def noted(request: Request, identity: Identity, action: str, **detail: Any) -> Note:
    """The line of the audit log that the catalogue adds in the transaction which does what a request asks for.

    Args:
        action: a noun and a verb, as in `file.delete`.
        detail: what else is worth knowing; never a secret.
    """
    request_id = getattr(request.state, "request_id", None)
    return Note(action, detail, identity.tenant_id, identity.key_id, request_id)


def record(request: Request, identity: Identity, action: str, target: str, outcome: str = "ok", **detail: Any) -> None:
    """Write a line to the audit log of its own; a service without a database has none.

    For refusals, and for how that ended whose beginning is in the log: a line that the database does not take goes to
    the process's log, and the request is answered all the same. Arguments as those of `noted`.
    """
    catalogue = service_of(request).catalogue
    if catalogue is None:
        return
    line = noted(request, identity, action, **detail)
    try:
        catalogue.audit.write(line, target, outcome)
    except Exception:
        _log.exception("the audit log lacks this line: %s of %r: %s", outcome, target, line)


def _authenticate(request: Request, catalogue: Catalogue) -> Identity:
    found = catalogue.keys.authenticate(_secret(request))
    if found is None:
        raise ApiError("Incorrect API key provided. Check it, or ask the operator for one.", 401, "invalid_api_key")
    if found.refusal is not None:
        message, code = _REFUSALS[found.refusal]
        raise ApiError(message, 401, code)
    tenant = found.tenant
    _count(catalogue, tenant.id, tenant.limits.requests_per_minute)
    return Identity(tenant.id, tenant.name, found.key.id, found.key.scopes, tenant.limits)


def _secret(request: Request) -> str:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret:
        raise ApiError(_NO_KEY, 401)
    return secret[:_MOST_CHARACTERS]


def _count(catalogue: Catalogue, tenant_id: str, most: int) -> None:
    count, seconds = catalogue.counts.request(tenant_id)
    if count > most:
        raise ApiError(
            f"Rate limit reached: {most} requests per minute. Please try again in {seconds}s.",
            429,
            "rate_limit_exceeded",
            retry_after_s=seconds,
        )
