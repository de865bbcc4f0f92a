"""`/v1/cola`: sessions of gradient learning, and the maps of the base model that they can be about.

What is asked in a session is in gradient_operations.py, files are in gradient_files.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from ot_ray.cola import AuxiliaryConfig, Site, tensor_shapes
from ot_ray.errors import NotFoundError
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.catalogue.gradient_refusals import GroupMismatchError
from serve.catalogue.records import GradientSession
from serve.failures import ApiError, model_not_found
from serve.routes import service_of
from serve.routes.gradient_model import model_of, plain_site
from serve.routes.identity import Identity, needs, noted
from serve.routes.once import OnceRoute, once_of
from serve.settings.gradients import GradientsConfig
from serve.wire.gradients import SessionObject, SessionRequest, SiteList, SiteObject
from serve.wire.paging import After, Limit, Listing, shown, unknown_cursor

router = APIRouter(prefix="/v1/cola", tags=["Gradient learning"], route_class=OnceRoute)

Asker = Annotated[Identity, Depends(needs("cola"))]
_FLOAT_BYTES = 4


@router.get("/sites", summary="List the sites of the base model")
def list_sites(request: Request, identity: Asker) -> SiteList:
    """Every map of the model that an auxiliary can stand beside, in the model's order."""
    return SiteList(data=[SiteObject(**plain_site(site)) for site in model_of(request).sites.values()])


@router.post("/sessions", summary="Open a session")
def create_session(request: Request, body: SessionRequest, identity: Asker) -> SessionObject:
    """Choose sites and an auxiliary beside each; then ask for operations, numbered 0, 1, 2 and so on."""
    settings, name = gradients_of(request), service_of(request).settings.model.name
    if body.model not in (None, name):
        raise model_not_found(shown(body.model or ""))
    _check_group(body)
    sites = model_of(request).matching(body.sites)
    _check_size(settings, sites, AuxiliaryConfig(**body.auxiliary.model_dump()))
    values = body.model_dump(mode="json", exclude={"model", "sites"})
    try:
        session = catalogue_of(request).gradient_sessions.create(
            identity.tenant_id,
            model=name,
            settings={**values, "sites": [plain_site(site) for site in sites.values()]},
            idle_s=settings.idle_s,
            session_id=once_of(request).new_id("cola-"),
            most_open=settings.open_sessions,
            audit=noted(request, identity, "cola.create", mode=body.mode, fit=body.fit, sites=len(sites)),
        )
    except GroupMismatchError as error:
        raise ApiError(
            f"The open sessions of group {body.group} have another {error.field}; choose another group.",
            409,
            "group_mismatch",
            error.field,
        ) from None
    if session is None:
        raise ApiError(
            f"{settings.open_sessions} sessions are open; close one, or wait until one expires.",
            429,
            "rate_limit_exceeded",
            retry_after_s=30,
        )
    return session_object(session)


@router.get("/sessions", summary="List sessions")
def list_sessions(request: Request, identity: Asker, after: After = None, limit: Limit = 20) -> Listing[SessionObject]:
    """The asker's sessions, the newest first, closed ones too."""
    try:
        page = catalogue_of(request).gradient_sessions.list(identity.tenant_id, after=after, limit=limit)
    except NotFoundError:
        raise unknown_cursor("session", after) from None
    return Listing.of([session_object(session) for session in page.items], page.has_more)


@router.get("/sessions/{session_id}", summary="Retrieve a session")
def get_session(request: Request, session_id: str, identity: Asker) -> SessionObject:
    """One session, with the version of its auxiliary and the number of its next operation."""
    return session_object(find_session(request, identity, session_id))


@router.delete("/sessions/{session_id}", summary="Close a session")
def close_session(request: Request, session_id: str, identity: Asker) -> SessionObject:
    """Take no more operations; those that are not over fail, and the session's files are removed."""
    session = find_session(request, identity, session_id)
    line = noted(request, identity, "cola.close")
    return session_object(catalogue_of(request).gradient_sessions.close(session.id, line))


def session_object(session: GradientSession) -> SessionObject:
    """A session as clients see it."""
    told = ("sites", "auxiliary", "mode", "group", "fit", "interval", "fitting", "metadata")
    return SessionObject(
        id=session.id,
        model=session.model,
        status=session.status,
        version=session.version,
        next_number=session.next_number,
        created_at=session.created_at,
        expires_at=session.expires_at,
        **{name: session.settings[name] for name in told},
    )


def find_session(request: Request, identity: Identity, session_id: str) -> GradientSession:
    """A session of the asker's. Raises ApiError, 404, for another's as for one that never was."""
    try:
        return catalogue_of(request).gradient_sessions.find(session_id, identity.tenant_id)
    except NotFoundError:
        raise ApiError(f"No such session: {shown(session_id)}", 404, param="session_id") from None


def gradients_of(request: Request) -> GradientsConfig:
    """The settings of gradient learning, without which these routes are not there."""
    settings = service_of(request).settings.gradients
    assert settings is not None, "these routes are mounted where gradient learning is set"
    return settings


def catalogue_of(request: Request) -> Catalogue:
    """The service's database."""
    catalogue = service_of(request).catalogue
    assert catalogue is not None, "these routes are mounted over a database only"
    return catalogue


def kept_in(request: Request) -> Store:
    """The service's store."""
    store = service_of(request).store
    assert store is not None, "a service with a database has a store"
    return store


def _check_group(body: SessionRequest) -> None:
    if body.mode == "alone" and body.group is not None:
        raise ApiError(
            "group belongs to the modes joint and collaboration; leave it out, or choose one of them.", param="group"
        )
    if body.mode != "alone" and body.group is None:
        raise ApiError(f"mode {body.mode} needs a group; name one.", param="group")


def _check_size(settings: GradientsConfig, sites: Mapping[str, Site], config: AuxiliaryConfig) -> None:
    if config.kind != "linear" and config.rank > settings.max_rank:
        raise ApiError(f"rank is {config.rank}; at most {settings.max_rank} is taken.", param="auxiliary.rank")
    size = _FLOAT_BYTES * sum(map(math.prod, tensor_shapes(sites, config).values()))
    if size > settings.max_auxiliary_bytes:
        raise ApiError(
            f"The auxiliary would have {size} bytes; at most {settings.max_auxiliary_bytes} are taken. Choose fewer "
            "sites, or a smaller rank.",
            param="auxiliary",
        )
