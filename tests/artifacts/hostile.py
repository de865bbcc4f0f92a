"""Adapters as an attacker would change them: other tensors or settings, with a manifest that agrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ot_ray.artifacts import AdapterManifest, InspectionLimits, inspect_adapter
from ot_ray.artifacts.folder import describe_files
from ot_ray.artifacts.manifest import to_text
from ot_ray.errors import AdapterRejectedError
from tests.artifacts.samples import Sample

Change = Callable[[dict[str, torch.Tensor]], None]


def relist(folder: Path, **changes: Any) -> None:
    """Make the manifest fit changed files, as an attacker would."""
    path = folder / "manifest.json"
    manifest = AdapterManifest.model_validate_json(path.read_bytes())
    values = {"files": describe_files(folder, manifest.files), **changes}
    path.write_bytes(to_text(manifest.model_copy(update=values)))


def change_tensors(folder: Path, change: Change) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    relist(folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    relist(folder)


def rejection(folder: Path, sample: Sample, limits: InspectionLimits | None = None) -> str:
    with pytest.raises(AdapterRejectedError) as caught:
        inspect_adapter(folder, sample.bundle.manifest, limits)
    return str(caught.value)


def put(name: str, value: Any) -> Change:
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


def spoil(name: str, value: float, count: int = 1) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[:count] = value

    return change
