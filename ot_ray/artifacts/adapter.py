"""Tuned adapters as files: plain tensors, or a standard PEFT folder, beside a small manifest.

Checking one that came back is left to inspection.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ot_ray.artifacts.checkpoint import ADAPTER_WEIGHTS, DTYPES
from ot_ray.artifacts.folder import describe_files, list_files, staged_folder
from ot_ray.artifacts.lora import LORA_CONFIG, LORA_WEIGHTS
from ot_ray.artifacts.manifest import MANIFEST, AdapterManifest, BundleManifest, now, to_text
from ot_ray.errors import ArtifactError
from ot_ray.model import FAMILIES, Method, adapter_state, depth_of

ADAPTER_FILES: dict[Method, tuple[str, ...]] = {
    "full": (ADAPTER_WEIGHTS,),
    "lora": (LORA_CONFIG, LORA_WEIGHTS),
}


def write_adapter(
    folder: str | Path,
    tuned: PreTrainedModel | PeftModel,
    bundle: BundleManifest,
    *,
    method: Method,
    steps: int,
    learning_rate: float,
    validation_loss: float | None = None,
) -> AdapterManifest:
    """Write what was tuned; the folder appears when it is complete.

    Args:
        tuned: the emulated model for `full`; the `PeftModel` of `prepare_tuning` for `lora`.
        bundle: the bundle that was tuned.
        steps, learning_rate, validation_loss: as in `AdapterManifest`.

    Raises:
        ArtifactError: the bundle does not take this method back, `tuned` is not made for it, or a tuned
            value is not finite.
        AlreadyExistsError: the folder is there and not empty.
    """
    if method not in bundle.methods:
        raise ArtifactError(f"method is {method!r}; bundle {bundle.bundle_id} takes {', '.join(bundle.methods)}")
    if (method == "lora") != isinstance(tuned, PeftModel):
        raise ArtifactError(f"method is {method!r}, but the model is a {type(tuned).__name__}; use prepare_tuning")
    with staged_folder(Path(folder)) as staging:
        if isinstance(tuned, PeftModel):
            _write_lora(staging, tuned, bundle)
        else:
            _write_full(staging, tuned, bundle)
        try:
            manifest = AdapterManifest(
                bundle_id=bundle.bundle_id,
                model=bundle.model,
                version=bundle.version,
                method=method,
                files=describe_files(staging, list_files(staging)[0]),
                steps=steps,
                learning_rate=learning_rate,
                validation_loss=validation_loss,
                created=now(),
            )
        except ValidationError as error:
            lines = (f"{item['loc'][0]} is {item['input']!r}: {item['msg']}" for item in error.errors())
            raise ArtifactError("the adapter's manifest cannot be written: " + "; ".join(lines)) from None
        (staging / MANIFEST).write_bytes(to_text(manifest))
    return manifest


def full_name(bundle: BundleManifest, short: str) -> str:
    """The bundle's name of a tensor that `adapter_state` calls ``layers.<position>.<name>``."""
    return f"{FAMILIES[bundle.model_type].layers}{short.removeprefix('layers')}"


def short_name(bundle: BundleManifest, full: str) -> str:
    """The name that `adapter_state` gives a tensor of the bundle's adapter."""
    return f"layers{full.removeprefix(FAMILIES[bundle.model_type].layers)}"


def _write_full(folder: Path, tuned: PreTrainedModel, bundle: BundleManifest) -> None:
    if depth_of(tuned) != bundle.plan.depth:
        raise ArtifactError(
            f"the model has {depth_of(tuned)} layers, bundle {bundle.bundle_id} has {bundle.plan.depth}; "
            "pass the model that was tuned"
        )
    state = {full_name(bundle, name): tensor for name, tensor in adapter_state(tuned, bundle.plan).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {entry.name: entry.shape for entry in bundle.adapter}:
        raise ArtifactError(
            f"the tensors of the adapter layers are not those of bundle {bundle.bundle_id}; "
            "tune the model that its load_model gives"
        )
    _refuse_unfit(state)
    # Layers of one model may share memory (as DeepSpeed's flat buffers do), which the format does not take.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _write_lora(folder: Path, tuned: PeftModel, bundle: BundleManifest) -> None:
    if "default" not in tuned.peft_config:
        raise ArtifactError(
            f"the model has adapters {', '.join(tuned.peft_config)}, none named default; use prepare_tuning"
        )
    _refuse_unfit({name: tensor for name, tensor in tuned.named_parameters() if ".lora_" in name})
    config = tuned.peft_config["default"]
    source = config.base_model_name_or_path
    # The path of the base model is the customer's own, and means nothing to whoever gets the adapter.
    config.base_model_name_or_path = bundle.bundle_id
    try:
        tuned.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = source
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card


def _refuse_unfit(state: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            raise ArtifactError(
                f"tensor {name} is of {tensor.dtype}; convert it to one of {', '.join(map(str, DTYPES))}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name} holds values that are not finite; tune with a lower learning rate")
