"""What makes a distillation the one it is: two runs with equal identities give equal emulators.

Checkpoints are refused, and versions are named, by it. How fast a run is computed is no part of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ot_ray.training.distill_config import DistillConfig

SCHEMA = 1
"""Raised when the code comes to give other weights for the same settings."""


def run_identity(config: DistillConfig, model_version: str, data_digest: str) -> dict[str, Any]:
    """Everything that decides the weights of an emulator, as plain values.

    Args:
        model_version: `ModelSource.version`, which stands for the full model's bytes.
        data_digest: `source_digest` of the training text, or `image_digest` of the training images.
    """
    # Left out where it says no more than `split` does, so that names which were given before it could be said stay.
    compressed = config.emulator.model_dump(mode="json", exclude_defaults=True)
    return {
        "schema": SCHEMA,
        **({"emulator": compressed} if compressed else {}),
        "model": {"version": model_version, "dtype": config.model.dtype},
        "split": config.split.model_dump(mode="json"),
        **(_of_images(data_digest) if config.images is not None else _of_text(config, data_digest)),
        "training": config.training.decisive(),
    }


def _of_text(config: DistillConfig, digest: str) -> dict[str, Any]:
    data = config.text.model_dump(mode="json")
    # Where the text lies, how many processes read it and how often it may be read through decide no batch; its digest
    # stands for what it says.
    for name in ("source", "tasks_folder", "revision", "workers", "prefetch", "passes"):
        data.pop(name)
    return {
        "data": {"digest": digest, **data},
        "sequence_length": config.sequence_length,
        "loss": config.loss.model_dump(mode="json"),
    }


def _of_images(digest: str) -> dict[str, Any]:
    # The digest stands for how many of each class are taken, too.
    return {"data": {"digest": digest, "kind": "images"}}


def identity_digest(identity: dict[str, Any]) -> str:
    """sha256 of an identity, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted names under which two identities differ, sorted."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{path}{key}.")
        elif one != other:
            found.append(f"{path}{key}")
    return found
