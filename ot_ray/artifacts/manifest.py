"""What the manifests of bundles and adapters say; nothing in them tells how deep the full model is.

Reading and verifying the files that a manifest lists is left to folder.py, bundle.py and inspection.py."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, Field

from ot_ray.config import Config
from ot_ray.model import Method, SplitPlan
from ot_ray.model.head import MOST_CHARACTERS, sound_class

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"

DATA_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".md"})
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def foreign(name: str) -> str | None:
    """Why a file of this name is never opened; None if its suffix says that it is data."""
    suffix = PurePosixPath(name).suffix
    if suffix in DATA_SUFFIXES:
        return None
    return (
        f"{name} is pickled, code or of an unknown kind ({suffix or 'no suffix'}), and is never opened; "
        f"use {', '.join(sorted(DATA_SUFFIXES))}"
    )


def _data_file(name: str) -> str:
    reason = foreign(name)
    if reason:
        raise ValueError(reason)
    return name


def _class(name: str) -> str:
    if not sound_class(name):
        raise ValueError(f"use 1 to {MOST_CHARACTERS} characters that are printed, without blanks at the ends")
    return name


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"class {twice[0]!r} stands twice; give each class one name")
    return names


Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
BundleId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,142}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,3}$", max_length=200),
    AfterValidator(_data_file),
]
ClassName = Annotated[str, AfterValidator(_class)]
SchemaVersion = Literal[1, 2]
Dtype = Literal["F32", "F16", "BF16"]


class FileEntry(Config):
    """One file: what it must be, to the byte."""

    bytes: int = Field(ge=0)
    """Size."""
    sha256: Sha256
    """Hash of the content, in hexadecimal."""


class TensorEntry(Config):
    """One tensor of the adapter, as it stands in the bundle."""

    name: str = Field(max_length=256)
    """Transformers' own name; the layer's number is its position in the bundle."""
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    """Dimensions."""
    dtype: Dtype
    """Element type, in safetensors' spelling."""


class BundleManifest(Config):
    """What a bundle is: `manifest.json`, which is written last."""

    schema_version: SchemaVersion = 1
    """Format of this document, as `schema_version` gives it."""
    bundle_id: BundleId
    """`<model>-<version>-<12 hexadecimal digits>`, the digits a hash over all files."""
    model: Name
    """The owner's name of the model."""
    version: Name
    """The owner's name of this version."""
    model_type: str = Field(max_length=64)
    """Transformers' name of the architecture."""
    plan: SplitPlan
    """Layers of the emulated model: positions in the bundle, never in the full model."""
    adapter: tuple[TensorEntry, ...]
    """Every tensor of the adapter layers, sorted by name."""
    head: tuple[TensorEntry, ...] = Field(default=(), exclude_if=lambda head: not head)
    """The classification head of an image model, which belongs to the adapter; it may return with other classes."""
    files: dict[FileName, FileEntry]
    """Every file but this one and the signature."""
    methods: tuple[Method, ...]
    """Tuning methods that the owner takes back."""
    recommended: dict[str, bool | int | float | str]
    """Hyperparameters that the owner recommends, such as `learning_rate`."""
    created: AwareDatetime
    """When it was written, UTC."""
    expires: AwareDatetime | None = None
    """When it stops being of use, UTC; None for never."""
    signing_key_id: Sha256 | None = None
    """Which key signed the folder (`key_id`); None for an unsigned bundle."""


class AdapterManifest(Config):
    """What a returned adapter is: `manifest.json` beside its files."""

    schema_version: SchemaVersion = 1
    """Format of this document, as `schema_version` gives it."""
    bundle_id: BundleId
    """The bundle that was tuned."""
    model: Name
    """Its model."""
    version: Name
    """Its version."""
    method: Method
    """How it was tuned."""
    bottleneck: int | None = Field(default=None, ge=1, exclude_if=lambda size: size is None)
    """Width of the bottlenecks of method `bottleneck`; None with every other."""
    classes: Annotated[tuple[ClassName, ...], AfterValidator(_different)] | None = Field(
        default=None, exclude_if=lambda classes: classes is None
    )
    """What an image model tells apart, each by a name of its own, in the order of the head's rows; None for a language
    model."""
    files: dict[FileName, FileEntry]
    """Every file but this one."""
    steps: int = Field(ge=0)
    """Optimiser steps."""
    learning_rate: float = Field(ge=0)
    """Peak learning rate."""
    validation_loss: float | None = None
    """Mean loss per token of the emulated model on the tuner's own validation data, in nats; None if unknown."""
    created: AwareDatetime
    """When it was written, UTC."""


def schema_version(methods: Iterable[Method], *later: object) -> SchemaVersion:
    """The oldest format that takes a document, so that whoever knows no newer one reads what it can use.

    Args:
        methods: the tuning methods that it names; format 1 knows full and lora.
        later: the values of its fields that format 1 lacks, which leaves out those that are empty or None.
    """
    return 2 if any(later) or not {"full", "lora"}.issuperset(methods) else 1


def bundle_id(model: str, version: str, files: Mapping[str, FileEntry]) -> str:
    """The id that follows from a bundle's name and content."""
    listing = "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return f"{model}-{version}-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"


def now() -> datetime:
    """The present in UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def to_text(document: Config) -> bytes:
    """A document as the bytes of its JSON file."""
    return document.model_dump_json(indent=2).encode() + b"\n"
