"""`/v1/offsite/bundles`: the bundles that customers tune at home, and their files.

Taking adapters back is in offsite_adapters.py."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ot_ray.artifacts import BundleManifest, FileEntry, Releases, published_manifest
from ot_ray.artifacts.manifest import MANIFEST, SIGNATURE
from ot_ray.errors import NotFoundError
from ot_ray.store import Store
from serve.failures import ApiError
from serve.routes import service_of
from serve.routes.downloads import Download, download
from serve.routes.identity import Identity, needs
from serve.service import Service
from serve.wire.offsite import BundleFile, BundleObject
from serve.wire.paging import Listing, shown

router = APIRouter(prefix="/v1/offsite", tags=["Offsite"])

Asker = Annotated[Identity, Depends(needs("offsite"))]

_CARD, _MOST_CARD_BYTES = "README.md", 256 * 1024
_GAP = re.compile(
    r"\| the owner's full model \| ([0-9]{1,12}\.[0-9]+) \|\n\| this bundle, untuned \| ([0-9]{1,12}\.[0-9]+) \|"
)


@dataclass(frozen=True)
class Offer:
    """A bundle of this service's model that was released."""

    manifest: BundleManifest
    prefix: str
    """Where its files lie in the store."""
    files: dict[str, FileEntry]
    """All of them, the manifest and the signature included."""


@router.get("/bundles", summary="List the bundles that are offered")
def list_bundles(request: Request, identity: Asker) -> Listing[BundleObject]:
    """The current release of the service's model."""
    service = service_of(request)
    store = store_of(service)
    version = Releases(store, service.settings.model.name).current()
    offers = [] if version is None else [_offer(store, service.settings.model.name, version)]
    return Listing.of([_object(store, offer) for offer in offers], has_more=False)


@router.get("/bundles/{bundle}", summary="Retrieve a bundle")
def get_bundle(request: Request, bundle: str, identity: Asker) -> BundleObject:
    """A bundle by its id, or the current one by the model's name."""
    service = service_of(request)
    return _object(store_of(service), find_offer(service, bundle))


@router.head("/bundles/{bundle}/files/{name:path}", include_in_schema=False)
@router.get(
    "/bundles/{bundle}/files/{name:path}",
    summary="Download a file of a bundle",
    response_class=Response,
    responses={
        200: {"description": "The file", "content": {"application/octet-stream": {}}},
        206: {"description": "The range asked for", "content": {"application/octet-stream": {}}},
        304: {"description": "The client has it already"},
        416: {"description": "The range begins beyond the end"},
    },
)
async def get_bundle_file(request: Request, bundle: str, name: str, identity: Asker) -> Response:
    """The bytes of one file, or a single range of them (`Range`, `If-Range`, `If-None-Match`)."""
    service = service_of(request)
    offer = await to_thread.run_sync(find_offer, service, bundle)
    entry = offer.files.get(name)
    if entry is None:
        raise ApiError(f"Bundle {offer.manifest.bundle_id} has no file {shown(name)}.", 404, param="name")
    item = Download(f"{offer.prefix}/{name}", entry.bytes, entry.sha256, name.rpartition("/")[2])
    return await download(request, store_of(service), item)


def store_of(service: Service) -> Store:
    """The service's store.

    Raises:
        ApiError: it has none, so that nothing is offered.
    """
    if service.store is None:
        raise ApiError("This service offers no bundles: it runs without a store.", 404, "unknown_url")
    return service.store


def find_offer(service: Service, name: str) -> Offer:
    """The bundle of this id, current or released before; by the model's name, the current one.

    Raises:
        ApiError: there is none.
    """
    store, model = store_of(service), service.settings.model.name
    releases = Releases(store, model)
    if name == model:
        version = releases.current()
        if version is not None:
            return _offer(store, model, version)
    elif name.startswith(f"{model}-"):
        # The version stands in the id, so that one manifest is read and not all.
        version = name.removeprefix(f"{model}-").rpartition("-")[0]
        if releases.released(version):
            offer = _offer(store, model, version)
            if offer.manifest.bundle_id == name:
                return offer
    raise ApiError(f"No such bundle: {shown(name)}. GET /v1/offsite/bundles lists those that are offered.", 404)


def _offer(store: Store, model: str, version: str) -> Offer:
    manifest = published_manifest(store, model, version)
    prefix = f"bundles/{model}/{version}"
    beside = [MANIFEST, *([SIGNATURE] if manifest.signing_key_id else [])]
    return Offer(manifest, prefix, {**manifest.files, **{name: _entry(store, f"{prefix}/{name}") for name in beside}})


def _entry(store: Store, key: str) -> FileEntry:
    data = store.read(key)
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _object(store: Store, offer: Offer) -> BundleObject:
    manifest = offer.manifest
    return BundleObject(
        id=manifest.bundle_id,
        model=manifest.model,
        version=manifest.version,
        bytes=sum(entry.bytes for entry in offer.files.values()),
        methods=list(manifest.methods),
        recommended=dict(manifest.recommended),
        gap=_gap(store, offer),
        created_at=int(manifest.created.timestamp()),
        expires_at=None if manifest.expires is None else int(manifest.expires.timestamp()),
        signing_key_id=manifest.signing_key_id,
        files=[
            BundleFile(name=name, bytes=entry.bytes, sha256=entry.sha256) for name, entry in sorted(offer.files.items())
        ],
    )


def _gap(store: Store, offer: Offer) -> dict[str, float] | None:
    """The figures that the bundle's card tells customers, where it has them."""
    try:
        text = store.read_range(f"{offer.prefix}/{_CARD}", 0, _MOST_CARD_BYTES).decode("utf-8", "replace")
    except NotFoundError:
        return None
    found = _GAP.search(text)
    return None if found is None else {"full": float(found[1]), "emulated": float(found[2])}
