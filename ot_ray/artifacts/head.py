"""The classification head of an image adapter: one small file beside the adapter's, whatever the tuning method.

The customer's classes may be others than the owner's, so its shape follows from their names in the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ot_ray.artifacts.checkpoint import DTYPES
from ot_ray.artifacts.manifest import MANIFEST, AdapterManifest, BundleManifest, TensorEntry
from ot_ray.errors import ArtifactError
from ot_ray.model import FAMILIES
from ot_ray.model.families import head_of
from ot_ray.model.head import HEAD

HEAD_WEIGHTS = "head.safetensors"


def head_files(bundle: BundleManifest) -> tuple[str, ...]:
    """What an adapter of this bundle holds beside the files of its method."""
    return (HEAD_WEIGHTS,) if bundle.head else ()


def head_entries(model: PreTrainedModel) -> tuple[TensorEntry, ...]:
    """The head's tensors under Transformers' names, sorted; none in a language model."""
    head, path = head_of(model), FAMILIES[model.config.model_type].head
    if head is None:
        return ()
    return tuple(
        TensorEntry(name=f"{path}.{name}", shape=tuple(tensor.shape), dtype=DTYPES[tensor.dtype])
        for name, tensor in sorted(head.state_dict().items())
    )


def head_shapes(bundle: BundleManifest, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a head's tensors for a number of classes: the first dimension of each is that number."""
    return {entry.name: (classes, *entry.shape[1:]) for entry in bundle.head}


def write_head(folder: Path, model: PreTrainedModel, bundle: BundleManifest) -> None:
    """Write the head of a tuned model.

    Raises:
        ArtifactError: it is not a head for this bundle, or of a type that adapters don't hold.
    """
    head = head_of(model)
    assert head is not None
    path, state = FAMILIES[bundle.model_type].head, head.state_dict()
    tensors = {f"{path}.{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    wanted = head_shapes(bundle, head.out_features)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise ArtifactError(
            f"the model's head does not fit bundle {bundle.bundle_id}; give the model that its load_model gives "
            "another one with prepare_head"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ArtifactError(f"tensor {name} is of {tensor.dtype}; use one of {', '.join(map(str, DTYPES))}")
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name} holds values that are not finite; tune with a lower learning rate")
    save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})


def wrong_classes(manifest: AdapterManifest, bundle: BundleManifest, most: int) -> Iterator[str]:
    """One line for each thing that is wrong with the classes that an adapter names."""
    classes = manifest.classes
    if not bundle.head:
        if classes is not None:
            yield f"{MANIFEST}: classes are named, but bundle {bundle.bundle_id} is of a model without; leave them out"
    elif classes is None:
        yield f"{MANIFEST}: classes is missing; write the adapter with write_adapter"
    elif not 2 <= len(classes) <= most:
        yield f"{MANIFEST}: classes names {len(classes)}; use 2..{most}"


def head_name(bundle: BundleManifest, full: str) -> str:
    """The name that `adapter_state` gives a tensor of the bundle's head."""
    return f"{HEAD}{full.removeprefix(str(FAMILIES[bundle.model_type].head))}"


def head_state(bundle: BundleManifest, head: Mapping[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """A head as `adapter_state` names its tensors, in memory of its own, of the type and device of `like`."""
    return {head_name(bundle, name): tensor.to(like, copy=True) for name, tensor in head.items()}
