"""Files of tenants: a row in the catalogue and bytes in the store that come and go together, whatever is killed when.

Who may see which file is asked by the routes; forms and HTTP are theirs too."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ot_ray.errors import OTRayError, StoreUnavailableError
from ot_ray.store import Store

if TYPE_CHECKING:
    from serve.catalogue import Catalogue
    from serve.catalogue.audit import Note
    from serve.catalogue.records import File

RESERVED_S = 6 * 3600
"""Seconds that storing one file may take; what is not done by then is swept."""

_log = logging.getLogger(__name__)


class TenantFullError(OTRayError, ValueError):
    """The file does not fit into what its tenant may keep."""


def file_key(tenant_id: str, file_id: str) -> str:
    """Where the store has the bytes of a file."""
    return f"files/{tenant_id}/{file_id}"


def keep_file(
    catalogue: Catalogue,
    store: Store,
    path: Path,
    *,
    tenant_id: str,
    filename: str,
    purpose: str,
    size: int,
    sha256: str,
    lasts_s: int | None = None,
    most_bytes: int | None = None,
    file_id: str | None = None,
    audit: Note | None = None,
) -> File:
    """Give a tenant a file. Its row is reserved first and shown last, so that nothing is half there.

    Args:
        size: bytes of the file at `path`.
        sha256: of these bytes, in hexadecimal.
        lasts_s: seconds after which it is deleted by itself; None keeps it.
        most_bytes: what the tenant may keep in all; None for no limit.
        file_id: an id chosen by the caller, with which a second call gives the same file; None makes one.
        audit: the line that the audit log gets when the file is there.

    Raises:
        TenantFullError: the tenant keeps too much already; nothing is stored.
        StoreError: the store did not take it; nothing is kept.
    """
    file = catalogue.files.create(
        tenant_id,
        filename=filename,
        bytes=size,
        sha256=sha256,
        purpose=purpose,
        lasts_s=lasts_s,
        most_bytes=most_bytes,
        file_id=file_id,
        reserved_s=RESERVED_S,
    )
    if file is None:
        raise TenantFullError(
            f"a file of {size} bytes does not fit into the {most_bytes} bytes that may be kept in all"
        )
    if file.deleted_at is None:
        return file
    key = file_key(tenant_id, file.id)
    try:
        stored = store.upload(path, key)
        if stored.sha256 != sha256:
            raise StoreUnavailableError(f"{key} changed on its way into the store; try again")
        if not catalogue.files.confirm(file.id, audit):
            raise StoreUnavailableError(f"storing {key} took longer than {RESERVED_S} seconds; try again")
    except BaseException:
        with suppress(OTRayError):
            # Another that carries out the same request may have shown it already.
            if catalogue.files.release(file.id):
                _remove(catalogue, store, file)
        raise
    return catalogue.files.get(tenant_id, file.id)


def drop_file(catalogue: Catalogue, store: Store, tenant_id: str, file_id: str, audit: Note | None = None) -> File:
    """Delete a tenant's file, which is in no answer from then on. Jobs have copies of their own and go on.

    Raises:
        NotFoundError: the tenant has no such file.
    """
    file = catalogue.files.delete(tenant_id, file_id, audit)
    try:
        _remove(catalogue, store, file)
    except OTRayError as error:
        _log.warning("the bytes of %s stay until they are swept: %s", file.id, error)
    return file


def sweep_files(catalogue: Catalogue, store: Store, limit: int = 100) -> int:
    """Delete files whose time is over, and what deletions and uploads that were cut off have left.

    Args:
        limit: the most files to work on, so that one call ends soon.

    Returns:
        How many files were removed.

    Raises:
        StoreError, DatabaseUnavailableError: the rest is left to the next call.
    """
    for file in catalogue.files.expired(limit):
        catalogue.files.forget(file.id)
    doomed = catalogue.files.doomed(limit)
    removed = 0
    for file in doomed:
        # Meanwhile another may have removed it, and the same request made it anew under the same id.
        if catalogue.files.is_doomed(file.id):
            _remove(catalogue, store, file)
            removed += 1
    return removed


def _remove(catalogue: Catalogue, store: Store, file: File) -> None:
    # The row goes last: without it nobody would know of the bytes.
    store.delete(file_key(file.tenant_id, file.id))
    catalogue.files.erase(file.id)
