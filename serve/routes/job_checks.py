"""What a request for a tuning job must meet before there is a job: model, bundle, files, and room in the queue.

What the files hold is checked later, by the controller."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ot_ray.artifacts import BundleManifest, Releases, published_manifest
from ot_ray.artifacts.manifest import now
from ot_ray.errors import NotFoundError
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.catalogue.records import File
from serve.failures import ApiError
from serve.routes.identity import Identity
from serve.service import Service
from serve.wire.fine_tuning import JobRequest
from serve.wire.paging import shown

QUEUE_RETRY_S = 60


def job_fields(service: Service, catalogue: Catalogue, identity: Identity, body: JobRequest) -> dict[str, Any]:
    """What the row of a new job holds.

    Raises:
        ApiError: something that the request names is not there, not the asker's or not for tuning, or the tenant's
            tokens of the day are used up.
    """
    base = service.settings.model.name
    _require_model(body.model, base)
    _require_one_place(body)
    method = (body.offsite and body.offsite.tuning_method) or service.settings.jobs.tuning_method
    bundle = _current_bundle(service.store, base, method)
    training = _usable_file(catalogue, identity.tenant_id, body.training_file, "training_file")
    validation = None
    if body.validation_file is not None:
        validation = _usable_file(catalogue, identity.tenant_id, body.validation_file, "validation_file")
    _require_tokens(catalogue, identity)
    return {
        "model": base,
        "bundle": {"model": bundle.model, "version": bundle.version, "bundle_id": bundle.bundle_id},
        "training_file": training.id,
        "validation_file": validation.id if validation else None,
        "seed": _seed(body, method, training, validation),
        "method": {"type": "supervised", "tuning_method": method},
        "hyperparameters": body.asked.model_dump(mode="json"),
        "suffix": body.suffix,
        "metadata": body.metadata,
    }


def _require_model(asked: str, base: str) -> None:
    """Raise ApiError unless the base model is asked for."""
    if asked == base:
        return
    tuned = asked.startswith("ft:")
    raise ApiError(
        f"The model `{shown(asked)}` "
        + ("is tuned already, and tuning it further is not offered" if tuned else "is not available for fine-tuning")
        + f"; use `{base}`.",
        code="model_not_available",
        param="model",
    )


def _require_one_place(body: JobRequest) -> None:
    """Raise ApiError if hyperparameters stand both in `method` and in their old place."""
    if body.hyperparameters is not None and body.asked is not body.hyperparameters:
        raise ApiError(
            "hyperparameters stand twice; keep those in method.supervised.hyperparameters.", param="hyperparameters"
        )


def _current_bundle(store: Store | None, model: str, method: str) -> BundleManifest:
    """The bundle that a job of this method tunes: the model's current release.

    Raises:
        ApiError: there is none, it has expired, or its owner does not take adapters of this method back.
    """
    version = Releases(store, model).current() if store is not None else None
    if store is None or version is None:
        raise ApiError(
            f"The model `{model}` cannot be tuned yet, because no bundle of it is released; ask the operator.",
            code="model_not_available",
            param="model",
        )
    manifest = published_manifest(store, model, version)
    if manifest.expires is not None and manifest.expires <= now():
        raise ApiError(
            f"The bundle of `{model}` has expired; ask the operator for a new release.",
            code="model_not_available",
            param="model",
        )
    if method not in manifest.methods:
        raise ApiError(
            f"Tuning method '{method}' is not taken for `{model}`; set offsite.tuning_method to one of: "
            f"{', '.join(manifest.methods)}.",
            code="tuning_method_not_available",
            param="offsite",
        )
    return manifest


def _usable_file(catalogue: Catalogue, tenant_id: str, file_id: str, param: str) -> File:
    """A tenant's file of examples.

    Args:
        param: the field that names it.

    Raises:
        ApiError: the tenant has no such file, or it is not there to be tuned on.
    """
    try:
        file = catalogue.files.get(tenant_id, file_id)
    except NotFoundError:
        raise ApiError(
            f"The file '{shown(file_id)}' given as {param} does not exist; upload it to /v1/files with purpose "
            "'fine-tune', and pass its id.",
            code="file_not_found",
            param=param,
        ) from None
    if file.purpose != "fine-tune":
        raise ApiError(
            f"The file '{file.id}' has purpose '{file.purpose}'; {param} must be uploaded with purpose 'fine-tune'.",
            code="invalid_file_purpose",
            param=param,
        )
    if file.status == "error":
        reason = f": {file.status_details}" if file.status_details else ""
        raise ApiError(f"The file '{file.id}' cannot be used{reason}.", code="invalid_file", param=param)
    return file


def _require_tokens(catalogue: Catalogue, identity: Identity) -> None:
    """Raise ApiError, 429, if the tenant's tokens of the day are used up; a job that needs more than are left is
    taken on, and waits."""
    per_day = identity.limits.tokens_per_day
    left, seconds = catalogue.counts.tokens_left(identity.tenant_id, per_day)
    if left == 0:
        raise ApiError(
            f"The limit of {per_day} training tokens a day is used up; try again after midnight (UTC).",
            429,
            "rate_limit_exceeded",
            retry_after_s=seconds,
        )


def queue_full(most: int) -> ApiError:
    """The answer to a job more than may wait."""
    return ApiError(
        f"You have {most} fine-tuning jobs waiting or paused, which is the most that may; try again when one has "
        "started, or cancel one.",
        429,
        "rate_limit_exceeded",
        retry_after_s=QUEUE_RETRY_S,
    )


def _seed(body: JobRequest, method: str, training: File, validation: File | None) -> int:
    """The seed that was asked for, or the one that follows from all that decides a job's result, so that the same
    request over the same bytes gets the same."""
    if body.seed is not None:
        return body.seed
    parts: list[Any] = [
        body.model,
        method,
        body.asked.model_dump(mode="json"),
        training.sha256,
        validation.sha256 if validation else None,
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
