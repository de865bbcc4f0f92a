"""Bundles out and adapters in, as types, and the limits on what comes in.

What makes an adapter acceptable is left to ot_ray.artifacts."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from ot_ray.artifacts import InspectionLimits
from ot_ray.artifacts.manifest import NAME_PATTERN
from ot_ray.artifacts.offsite import ADAPTER_NAMES, DOCUMENTS, MANIFEST, MOST_DOCUMENT_BYTES, checked_suffix
from ot_ray.config import Config
from serve.wire.base import Request, at_most

SMALLEST_PIECE = 256 * 1024
"""Bytes; only the last piece of a file may be smaller, so that no upload becomes a million objects."""


class OffsiteConfig(Config):
    """What customers may send back."""

    limits: InspectionLimits = InspectionLimits()
    """How large an adapter may be, and how far its tensors may move."""
    piece_bytes: int = Field(default=64 * 2**20, ge=SMALLEST_PIECE, le=2**32)
    """Largest body of one PUT; larger files come in several."""
    open_uploads: int = Field(default=8, ge=1)
    """Uploads of one tenant that have no verdict yet; a further one is answered 429."""
    abandoned_s: int = Field(default=24 * 3600, ge=60)
    """Seconds after the last piece of an unfinished upload until it is deleted."""
    max_perplexity_ratio: float = Field(default=100.0, gt=0)
    """The plug-in model's perplexity on the canary text, over the base model's, must not exceed this. A model that was
    tuned on something else than prose is worse at prose, and a broken one by far more."""


class BundleFile(BaseModel):
    """One file of a bundle."""

    name: str
    bytes: int
    sha256: str


class BundleObject(BaseModel):
    """A bundle that is offered for tuning at home."""

    id: str
    object: Literal["offsite.bundle"] = "offsite.bundle"
    model: str
    version: str
    bytes: int
    """All files together."""
    methods: list[str]
    """Tuning methods that are taken back."""
    recommended: dict[str, Any]
    """Hyperparameters."""
    gap: dict[str, float] | None
    """Perplexity on the owner's held-out public data: `full` of the owner's model, `emulated` of the untuned bundle."""
    created_at: int
    """Seconds since 1970."""
    expires_at: int | None
    signing_key_id: str | None
    """sha256 of the public key that the bundle is signed for; null for an unsigned one."""
    files: list[BundleFile]
    """Every file, the manifest and the signature included."""


def _known(name: str) -> str:
    if name not in ADAPTER_NAMES:
        raise ValueError(f"an adapter has no such file; use {', '.join(sorted(ADAPTER_NAMES))}")
    return name


class AnnouncedFile(Request):
    """One file that will be sent."""

    name: Annotated[str, StringConstraints(max_length=128), AfterValidator(_known)]
    bytes: int = Field(ge=1, le=2**50)
    """Its size."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def _consistent(files: list[AnnouncedFile]) -> list[AnnouncedFile]:
    twice = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is announced twice")
    if MANIFEST not in {file.name for file in files}:
        raise ValueError(f"{MANIFEST} is missing; it belongs to every adapter")
    large = [file.name for file in files if file.name in DOCUMENTS and file.bytes > MOST_DOCUMENT_BYTES]
    if large:
        raise ValueError(f"{large[0]} has more than {MOST_DOCUMENT_BYTES} bytes")
    return files


class AdapterRequest(Request):
    """An adapter that will be sent: which bundle it was tuned from, what to call it, and its files."""

    bundle_id: str = Field(min_length=1, max_length=160)
    suffix: Annotated[str, StringConstraints(max_length=128), AfterValidator(checked_suffix)] = Field(
        "default", json_schema_extra={"pattern": f"^{NAME_PATTERN}$"}
    )
    """The tenant's name for it, part of the model's id; the last one accepted under a suffix is the current one."""
    files: Annotated[list[AnnouncedFile], at_most(8), AfterValidator(_consistent)] = Field(min_length=2, max_length=8)


class ReceivedFile(BaseModel):
    """One file of an upload."""

    name: str
    bytes: int
    sha256: str
    received: int | None
    """Bytes that are here, from the first on; null where nobody counts any more."""


class AdapterObject(BaseModel):
    """An adapter on its way in, or what became of it."""

    id: str
    object: Literal["offsite.adapter"] = "offsite.adapter"
    bundle_id: str
    suffix: str
    state: Literal["receiving", "received", "inspecting", "accepted", "rejected"]
    reasons: list[str]
    """Everything that is wrong with a rejected one."""
    report: dict[str, float] | None
    """Figures of the inspection and the canary run."""
    model_id: str | None
    """The model to ask for, once it is accepted."""
    bytes: int
    files: list[ReceivedFile]
    piece_bytes: int
    """Largest body of one PUT."""
    created_at: int
    """Seconds since 1970."""
    finished_at: int | None


class AdapterDeleted(BaseModel):
    """The answer to the deletion of an upload."""

    id: str
    object: Literal["offsite.adapter"] = "offsite.adapter"
    deleted: bool = True
