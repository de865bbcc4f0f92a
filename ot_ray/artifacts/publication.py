"""Bundles in a store: published once under a version, fetched verified.

What a bundle is, and whether to trust it, is left to bundle.py."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from ot_ray.artifacts.adapter_tensors import short_name
from ot_ray.artifacts.bundle import Bundle, open_bundle
from ot_ray.artifacts.checkpoint import ADAPTER_WEIGHTS
from ot_ray.artifacts.folder import staged_folder
from ot_ray.artifacts.head import head_name
from ot_ray.artifacts.manifest import MANIFEST, NAME_PATTERN, SIGNATURE, BundleManifest
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.errors import AlreadyExistsError, ArtifactError, NotFoundError
from ot_ray.store import Store, upload_folder
from ot_ray.store.base import Advance

_NAME = re.compile(NAME_PATTERN)


def publish_bundle(store: Store, folder: str | Path, progress: Advance | None = None) -> str:
    """Upload a bundle; it becomes visible, once and for all, when its manifest is there.

    Args:
        progress: called with the number of bytes moved since the last call.

    Returns:
        The prefix under which it lies, `bundles/<model>/<version>`.

    Raises:
        ArtifactError: the folder is no valid bundle.
        AlreadyExistsError: this version is published.
    """
    manifest = open_bundle(folder).manifest
    prefix = _prefix(manifest.model, manifest.version)
    try:
        upload_folder(store, folder, prefix, last=MANIFEST, progress=progress)
    except AlreadyExistsError as error:
        raise AlreadyExistsError(
            f"version {manifest.version} of {manifest.model} is already published in {store.url}, and a "
            "published version never changes; choose another version"
        ) from error
    return prefix


def fetch_bundle(
    store: Store,
    model: str,
    version: str,
    folder: str | Path,
    public_key: Path | None = None,
    progress: Advance | None = None,
) -> Bundle:
    """Download a bundle and verify it; the folder appears only if every file is as it was published.

    Args:
        public_key: as in `open_bundle`.
        progress: called with the number of bytes moved since the last call.

    Raises:
        NotFoundError: no such version is published; names those that are.
        AlreadyExistsError: the folder is there and not empty.
        ArtifactError, SignatureError: as `open_bundle`.
    """
    folder, prefix = Path(folder), _prefix(model, version)
    text = _manifest_text(store, model, version)
    manifest = parse_json(BundleManifest, text, f"{prefix}/{MANIFEST}")
    with staged_folder(folder) as staging:
        for name, entry in manifest.files.items():
            store.download(f"{prefix}/{name}", staging / name, sha256=entry.sha256, progress=progress)
        if manifest.signing_key_id:
            store.download(f"{prefix}/{SIGNATURE}", staging / SIGNATURE)
        (staging / MANIFEST).write_bytes(text)
        open_bundle(staging, public_key)
    return Bundle(folder, manifest)


def published_manifest(store: Store, model: str, version: str) -> BundleManifest:
    """What a published bundle says of itself.

    Raises:
        NotFoundError: no such version is published; names those that are.
        ArtifactError: the stored manifest is malformed.
    """
    return parse_json(BundleManifest, _manifest_text(store, model, version), f"{_prefix(model, version)}/{MANIFEST}")


def published_adapter(store: Store, manifest: BundleManifest) -> dict[str, torch.Tensor]:
    """The untuned adapter of a published bundle, verified, with a classification head where there is one.

    Returns:
        Tensors as `adapter_state` names them; nothing of the emulator is read.

    Raises:
        NotFoundError: the bundle is not published.
        StoreError: the stored bytes are not those that were published.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ADAPTER_WEIGHTS)
        key = f"{_prefix(manifest.model, manifest.version)}/{ADAPTER_WEIGHTS}"
        store.download(key, path, sha256=manifest.files[ADAPTER_WEIGHTS].sha256)
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    layers = {entry.name: short_name(manifest, entry.name) for entry in manifest.adapter}
    head = {entry.name: head_name(manifest, entry.name) for entry in manifest.head}
    return {name: tensors[full] for full, name in {**layers, **head}.items()}


def list_versions(store: Store, model: str) -> list[str]:
    """The published versions of a model, in natural order: `1.9` stands before `1.10`."""
    prefix = f"bundles/{checked_name('model', model)}/"
    ends = (key.removeprefix(prefix).split("/") for key in store.list(prefix.rstrip("/")))
    return sorted((end[0] for end in ends if end[1:] == [MANIFEST]), key=_natural)


def _manifest_text(store: Store, model: str, version: str) -> bytes:
    try:
        return store.read(f"{_prefix(model, version)}/{MANIFEST}")
    except NotFoundError as error:
        versions = ", ".join(list_versions(store, model)) or "none"
        raise NotFoundError(
            f"version {version} of {model} is not published in {store.url}; published versions: {versions}"
        ) from error


def _prefix(model: str, version: str) -> str:
    return f"bundles/{checked_name('model', model)}/{checked_name('version', version)}"


def checked_name(field: str, name: str) -> str:
    """The name itself, where it can stand in a key. Raises ArtifactError."""
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{field} is {name[:80]!r}, which is no name; use {NAME_PATTERN}")
    return name


def _natural(version: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", version)]
