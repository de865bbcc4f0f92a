"""`/v1/admin`: tenants and keys, for the operator.

The same at the shell is serve/admin.py; what keys are good for is decided in identity.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from ot_ray.errors import AlreadyExistsError, ConfigError, NotFoundError
from serve.catalogue import Catalogue, TenantLimits
from serve.catalogue.keys import NewKey
from serve.catalogue.records import ApiKey, Tenant
from serve.failures import ApiError
from serve.routes import service_of
from serve.routes.identity import Identity, needs, noted
from serve.routes.once import OnceRoute, once_of
from serve.wire.keys import (
    KeyCard,
    KeyRequest,
    Limits,
    NewKeyCard,
    RotateRequest,
    TenantCard,
    TenantChange,
    TenantRequest,
)
from serve.wire.paging import After, Limit, Listing

router = APIRouter(prefix="/v1/admin", tags=["Admin"], route_class=OnceRoute)

_Admin = Annotated[Identity, Depends(needs("admin"))]


@router.post("/tenants", summary="Create a tenant")
def create_tenant(request: Request, body: TenantRequest, identity: _Admin) -> TenantCard:
    """Add a tenant."""
    with _told():
        tenant = _catalogue(request).tenants.create(
            body.name,
            _limits(TenantLimits(), body.limits),
            tenant_id=once_of(request).new_id("ten_"),
            audit=noted(request, identity, "tenant.create", name=body.name),
        )
    return _tenant(tenant)


@router.get("/tenants", summary="List tenants")
def list_tenants(request: Request, identity: _Admin, after: After = None, limit: Limit = 20) -> Listing[TenantCard]:
    """Tenants, the newest first."""
    with _told():
        page = _catalogue(request).tenants.page(after=after, limit=limit)
    return Listing[TenantCard].of([_tenant(tenant) for tenant in page.items], page.has_more)


@router.get("/tenants/{tenant_id}", summary="Retrieve a tenant")
def get_tenant(request: Request, tenant_id: str, identity: _Admin) -> TenantCard:
    """One tenant."""
    with _told():
        return _tenant(_catalogue(request).tenants.get(tenant_id))


@router.post("/tenants/{tenant_id}", summary="Modify a tenant")
def change_tenant(request: Request, tenant_id: str, body: TenantChange, identity: _Admin) -> TenantCard:
    """Give a tenant other limits, or refuse and take its keys; both hold from the next request on."""
    changed = body.limits.model_dump(exclude_none=True)
    line = noted(request, identity, "tenant.change", limits=changed, disabled=body.disabled)
    with _told():
        return _tenant(
            _catalogue(request).tenants.change(tenant_id, limits=changed, disabled=body.disabled, audit=line)
        )


@router.post("/keys", summary="Create a key")
def create_key(request: Request, body: KeyRequest, identity: _Admin) -> NewKeyCard:
    """Add a key; its secret is in this answer and nowhere else."""
    catalogue, once = _catalogue(request), once_of(request)
    once.hide("secret")
    expires_at = None if body.expires_days is None else catalogue.now() + body.expires_days * 24 * 3600
    line = noted(request, identity, "key.create", tenant=body.tenant_id, scopes=sorted(body.scopes))
    key_id, named = once.new_id("key_"), body.name
    with _told():
        made = catalogue.keys.create(
            body.tenant_id, body.scopes, name=named, expires_at=expires_at, key_id=key_id, audit=line
        )
    return _new_key(made)


@router.get("/keys", summary="List keys")
def list_keys(
    request: Request, identity: _Admin, after: After = None, limit: Limit = 20, tenant_id: str | None = None
) -> Listing[KeyCard]:
    """Keys of one tenant or of all, the newest first."""
    with _told():
        page = _catalogue(request).keys.list(tenant_id, after=after, limit=limit)
    return Listing[KeyCard].of([KeyCard(**_key(key)) for key in page.items], page.has_more)


@router.get("/keys/{key_id}", summary="Retrieve a key")
def get_key(request: Request, key_id: str, identity: _Admin) -> KeyCard:
    """One key, without its secret."""
    with _told():
        return KeyCard(**_key(_catalogue(request).keys.get(key_id)))


@router.post("/keys/{key_id}/rotate", summary="Rotate a key")
def rotate_key(request: Request, key_id: str, body: RotateRequest, identity: _Admin) -> NewKeyCard:
    """A new secret with the same scopes; the old one is taken for a while longer."""
    once = once_of(request)
    once.hide("secret")
    new, overlap_s = once.new_id("key_"), body.overlap_seconds
    line = noted(request, identity, "key.rotate", new=new, overlap_s=overlap_s)
    with _told():
        made = _catalogue(request).keys.rotate(key_id, overlap_s=overlap_s, successor_id=new, audit=line)
    return _new_key(made)


@router.delete("/keys/{key_id}", summary="Revoke a key")
def revoke_key(request: Request, key_id: str, identity: _Admin) -> KeyCard:
    """Refuse a key for good, from the next request on."""
    with _told():
        return KeyCard(**_key(_catalogue(request).keys.revoke(key_id, noted(request, identity, "key.revoke"))))


def _catalogue(request: Request) -> Catalogue:
    catalogue = service_of(request).catalogue
    assert catalogue is not None  # a service without one knows no key with the scope
    return catalogue


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise ApiError(f"{error}.", 404, "not_found") from None
    except AlreadyExistsError as error:
        raise ApiError(f"{error}.", 409, "already_exists") from None
    except ConfigError as error:
        raise ApiError(f"{error}.", code="invalid_value") from None


def _limits(before: TenantLimits, changes: Limits) -> TenantLimits:
    return before.model_copy(update=changes.model_dump(exclude_none=True))


def _tenant(tenant: Tenant) -> TenantCard:
    return TenantCard(**{**asdict(tenant), "limits": tenant.limits.model_dump()})


def _key(key: ApiKey) -> dict[str, Any]:
    return {**asdict(key), "scopes": sorted(key.scopes)}


def _new_key(made: NewKey) -> NewKeyCard:
    return NewKeyCard(**_key(made.key), secret=made.secret)
