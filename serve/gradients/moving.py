"""load and step: an auxiliary becomes what its customer fitted, or what the server's fitter makes of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ot_ray.cola import make_fitter
from ot_ray.errors import GradientLearningError
from serve.catalogue.records import GradientOperation
from serve.failures import ApiError
from serve.gradients.desk import Desk


def load(desk: Desk, operation: GradientOperation) -> None:
    """Make uploaded tensors the next version; what the server had collected for the one before is dropped.

    Raises:
        ApiError: they were fitted from another version than the present one, or are no safetensors.
        GradientLearningError, NotFiniteError: they are none of this session's auxiliary; nothing has changed.
    """
    try:
        _load(desk, operation)
    except (ApiError, GradientLearningError):
        # Nobody asks for them again, unless an attempt that was taken for lost has made them the present version.
        key = operation.request["key"]
        if desk.catalogue.gradient_sessions.auxiliary(operation.auxiliary_id).key != key:
            desk.store.delete(key)
        raise


def _load(desk: Desk, operation: GradientOperation) -> None:
    plan, key = desk.plan(operation.session_id), operation.request["key"]
    resident, fitted_from = desk.resident(plan), operation.request["version"]
    if fitted_from != resident.version:
        raise ApiError(
            f"These tensors were fitted from version {fitted_from}, but the auxiliary is at version "
            f"{resident.version}; fit what that version's pass yielded.",
            409,
            "version_conflict",
            "version",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "uploaded.safetensors"
        desk.store.download(key, path)
        try:
            tensors = load_file(path)
        except SafetensorError:
            raise ApiError("The upload is no safetensors file; write it anew.", param="body") from None
    resident.auxiliary.load(tensors)
    if plan.fit == "server":
        resident.fitter = make_fitter(resident.auxiliary, plan.fitting)
    desk.succeed_moved(operation, {}, resident, key)


def step(desk: Desk, operation: GradientOperation) -> None:
    """Fit what was collected.

    Raises:
        ApiError: the customer fits this session itself.
    """
    plan = desk.plan(operation.session_id)
    resident = desk.resident(plan)
    if plan.fit != "server" or resident.fitter is None:
        raise ApiError("This session's auxiliary is fitted by its customer; upload it instead.", code="fit_is_client")
    version = resident.version
    if resident.fitter.flush():
        desk.succeed_moved(operation, {"fits": resident.fitter.steps}, resident)
    else:
        desk.succeed(operation, {"fits": resident.fitter.steps}, version)
