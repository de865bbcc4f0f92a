"""What gradient learning keeps in the store: where each thing lies, and when it goes.

What the files hold is their writers' to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ot_ray.store import Store

if TYPE_CHECKING:
    from serve.catalogue import Catalogue
    from serve.catalogue.records import GradientAuxiliary, GradientOperation, GradientSession

SETTLED_S = 300
"""Seconds after which nobody writes for a session any more that was closed."""
_ROOT = "cola"


def session_prefix(tenant_id: str, session_id: str) -> str:
    """Below it lies what one session made: gradients and saved files. It goes with the session."""
    return f"{_ROOT}/{tenant_id}/{session_id}"


def auxiliary_prefix(tenant_id: str, auxiliary_id: str) -> str:
    """Below it lie the states of an auxiliary, and what was uploaded to become one; several sessions may share it."""
    return f"{_ROOT}/{tenant_id}/{auxiliary_id}"


def gradients_key(operation: GradientOperation) -> str:
    """The gradients that this attempt at an operation writes."""
    place = session_prefix(operation.tenant_id, operation.session_id)
    return f"{place}/gradients/{operation.number}-{operation.attempt}.safetensors"


def saved_prefix(operation: GradientOperation) -> str:
    """The files that this attempt at an operation saves lie below it."""
    place = session_prefix(operation.tenant_id, operation.session_id)
    return f"{place}/saved/{operation.number}-{operation.attempt}"


def upload_key(session: GradientSession, number: int, sha256: str) -> str:
    """An auxiliary that came as operation `number` of a session; it may outlive the session, as the auxiliary does."""
    place = auxiliary_prefix(session.tenant_id, session.auxiliary_id)
    return f"{place}/uploads/{session.id}-{number}-{sha256}.safetensors"


def start_key(auxiliary: GradientAuxiliary) -> str:
    """The fresh start of an auxiliary, where somebody has asked for it."""
    return f"{auxiliary_prefix(auxiliary.tenant_id, auxiliary.id)}/start.safetensors"


def state_key(operation: GradientOperation, version: int) -> str:
    """The auxiliary's tensors as this attempt at an operation brings them to `version`."""
    place = auxiliary_prefix(operation.tenant_id, operation.auxiliary_id)
    return f"{place}/states/{version}-{operation.id}-{operation.attempt}.safetensors"


def sweep_gradients(catalogue: Catalogue, store: Store, limit: int = 100, closed_for_s: int = SETTLED_S) -> int:
    """Close the sessions of which nothing was asked for long, and remove what closed ones have left.

    Args:
        limit: the most sessions to work on, so that one call ends soon.
        closed_for_s: seconds since a session was closed; whoever carried out something of it then is done by now.

    Returns:
        How many sessions were cleaned up.

    Raises:
        StoreError, DatabaseUnavailableError: the rest is left to the next call.
    """
    sessions = catalogue.gradient_sessions
    sessions.expire_idle(limit)
    doomed = sessions.uncleaned(limit, closed_for_s)
    for session in doomed:
        store.delete_prefix(session_prefix(session.tenant_id, session.id))
        if not sessions.sharing(session.auxiliary_id):
            store.delete_prefix(auxiliary_prefix(session.tenant_id, session.auxiliary_id))
        # The row goes last: without it nobody would know of the bytes.
        sessions.cleaned(session.id)
    return len(doomed)
