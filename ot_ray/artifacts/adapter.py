"""Tuned adapters as files: plain tensors, or a standard PEFT folder, beside a small manifest.

Checking one that came back is left to inspection.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ot_ray.artifacts.adapter_tensors import Shapes, bottleneck_hosts, full_name, plain_shapes
from ot_ray.artifacts.checkpoint import ADAPTER_WEIGHTS, DTYPES
from ot_ray.artifacts.folder import describe_files, list_files, staged_folder
from ot_ray.artifacts.head import write_head
from ot_ray.artifacts.lora import LORA_CONFIG, LORA_WEIGHTS
from ot_ray.artifacts.manifest import MANIFEST, AdapterManifest, BundleManifest, now, schema_version, to_text
from ot_ray.errors import ArtifactError
from ot_ray.model import Method, adapter_state, classes_of, depth_of
from ot_ray.model.bottleneck import CHILD
from ot_ray.model.head import is_head

ADAPTER_FILES: dict[Method, tuple[str, ...]] = {
    "full": (ADAPTER_WEIGHTS,),
    "lora": (LORA_CONFIG, LORA_WEIGHTS),
    "bottleneck": (ADAPTER_WEIGHTS,),
    "bitfit": (ADAPTER_WEIGHTS,),
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
        tuned: what `prepare_tuning` gave: the `PeftModel` for `lora`, else the emulated model.
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
    size = _bottleneck_size(tuned, bundle) if method == "bottleneck" else None
    with staged_folder(Path(folder)) as staging:
        if isinstance(tuned, PeftModel):
            _write_lora(staging, tuned, bundle)
        else:
            _write_plain(staging, tuned, bundle, method, size)
        base: PreTrainedModel = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned  # type: ignore[assignment] - its stub says any module
        if bundle.head:
            write_head(staging, base, bundle)
        classes = classes_of(base) if bundle.head else None
        try:
            manifest = AdapterManifest(
                schema_version=schema_version([method], size, classes),
                bundle_id=bundle.bundle_id,
                model=bundle.model,
                version=bundle.version,
                method=method,
                bottleneck=size,
                classes=classes,
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


def _bottleneck_size(tuned: torch.nn.Module, bundle: BundleManifest) -> int:
    """The bottlenecks' width; where they have several, the tensors are refused by their shapes."""
    host = next(iter(bottleneck_hosts(bundle)))
    down = dict(tuned.named_parameters()).get(f"{host}.{CHILD}.down.weight")
    if down is None:
        raise ArtifactError(f"method is 'bottleneck', but there is no bottleneck behind {host}; use prepare_tuning")
    return down.shape[0]


def _write_plain(
    folder: Path, tuned: PreTrainedModel, bundle: BundleManifest, method: Method, size: int | None
) -> None:
    if depth_of(tuned) != bundle.plan.depth:
        raise ArtifactError(
            f"the model has {depth_of(tuned)} layers, bundle {bundle.bundle_id} has {bundle.plan.depth}; "
            "pass the model that was tuned"
        )
    # A classification head has a file of its own.
    layers = {name: tensor for name, tensor in adapter_state(tuned, bundle.plan).items() if not is_head(name)}
    state = {full_name(bundle, name): tensor for name, tensor in layers.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = plain_shapes(method, bundle, size)
    if shapes != {**plain_shapes("full", bundle), **wanted}:
        raise ArtifactError(
            f"the tensors of the adapter layers are not those of bundle {bundle.bundle_id}; "
            f"tune what prepare_tuning makes for {method!r} of the model that its load_model gives"
        )
    state = {name: state[name] for name in wanted}
    _refuse_left_behind(tuned, bundle, method, wanted)
    _refuse_unfit(state)
    # Layers of one model may share memory (as DeepSpeed's flat buffers do), which the format does not take.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _refuse_left_behind(tuned: PreTrainedModel, bundle: BundleManifest, method: Method, wanted: Shapes) -> None:
    inside = {entry.name for entry in bundle.adapter} - wanted.keys()
    learning = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad and name in inside]
    if learning:
        raise ArtifactError(
            f"tensor {learning[0]} has gradients, but method {method!r} does not tune it, so that it would be "
            "left behind; use prepare_tuning with that method"
        )


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
    if config.task_type is None:
        # Without a task, PEFT names the class of the base model, to be imported; nobody reads it here.
        path = folder / LORA_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}, indent=2))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card


def _refuse_unfit(state: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            raise ArtifactError(
                f"tensor {name} is of {tensor.dtype}; convert it to one of {', '.join(map(str, DTYPES))}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name} holds values that are not finite; tune with a lower learning rate")
