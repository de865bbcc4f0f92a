"""What comes back from a customer is data from outside: everything is checked before it is loaded.

All reasons to refuse are collected, so that a customer mends them in one go. How far tensors may move is left to
changes.py, and whether a sound adapter is a good one to evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file

from ot_ray.artifacts.adapter import ADAPTER_FILES
from ot_ray.artifacts.adapter_tensors import Shapes, like, plain_shapes, short_name
from ot_ray.artifacts.changes import ChangeLimits, rejected
from ot_ray.artifacts.checkpoint import DTYPES
from ot_ray.artifacts.folder import check_files, list_files
from ot_ray.artifacts.head import HEAD_WEIGHTS, head_files, head_shapes, head_state, wrong_classes
from ot_ray.artifacts.lora import (
    LORA_CONFIG,
    LoraAdapterConfig,
    contradictions,
    lora_shapes,
    merge,
)
from ot_ray.artifacts.manifest import MANIFEST, AdapterManifest, BundleManifest, foreign
from ot_ray.artifacts.safetensors_header import HeaderTensor, read_header
from ot_ray.artifacts.strict_json import read_json
from ot_ray.config import Config
from ot_ray.errors import ArtifactError
from ot_ray.model.head import is_head

_TORCH = {text: dtype for dtype, text in DTYPES.items()}
_MOST_REASONS = 20  # of one kind; a file of a million wrong names must not make a message of a million lines


class InspectionLimits(Config):
    """How large a returned adapter may be, and how far from the original."""

    max_bytes: int = Field(default=8 * 1024**3, ge=1)
    """All files together, bytes."""
    max_rank: int = Field(default=256, ge=1)
    """Rank of LoRA updates."""
    max_bottleneck: int = Field(default=1024, ge=1)
    """Width of bottlenecks."""
    max_classes: int = Field(default=25_000, ge=2)
    """Classes of an image model's head."""
    changes: ChangeLimits = ChangeLimits()
    """How far each tensor may move, once merged."""


@dataclass(frozen=True)
class InspectedAdapter:
    """An adapter that passed; `tensors` are as the file names them, on the CPU."""

    manifest: AdapterManifest
    bundle: BundleManifest
    tensors: dict[str, torch.Tensor]
    lora: LoraAdapterConfig | None
    head: dict[str, torch.Tensor] = field(default_factory=dict)


def inspect_adapter(
    folder: str | Path, bundle: BundleManifest, limits: InspectionLimits | None = None
) -> InspectedAdapter:
    """Check a returned adapter against the bundle it was made from, and load it.

    Raises:
        AdapterRejectedError: lists every reason that was found; nothing was loaded that failed a check.
        NotFoundError: there is no such folder.
    """
    inspection = _Inspection(Path(folder), bundle, limits or InspectionLimits())
    adapter = inspection.run()
    if adapter is None or inspection.reasons:
        raise rejected(inspection.reasons)
    return adapter


def plain_state(adapter: InspectedAdapter, original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tuned adapter layers as plain tensors that `plug_in` takes, LoRA updates merged in.

    Args:
        original: the untuned adapter, as `adapter_state` gives it for the full or the emulated model.

    Returns:
        Tensors named as in `original` and of the same shapes and dtypes; for method `bottleneck` the bottlenecks'
        beside them, each of the dtype of its linear map. A head is the customer's, of as many classes as the
        adapter's manifest names.

    Raises:
        AdapterRejectedError: a value does not fit the dtype of `original`, or merging overflows.
        ArtifactError: `original` is not the adapter of this bundle.
    """
    bundle = adapter.bundle
    names = {short_name(bundle, entry.name): entry for entry in bundle.adapter}
    heads = {name: tensor for name, tensor in original.items() if is_head(name)}
    if {name: tuple(tensor.shape) for name, tensor in original.items() if name not in heads} != {
        name: entry.shape for name, entry in names.items()
    } or bool(heads) != bool(bundle.head):
        raise ArtifactError(
            f"`original` is not the adapter of bundle {bundle.bundle_id} (plan {bundle.plan}); pass "
            "adapter_state of the model that the bundle was made from"
        )
    untuned = {entry.name: original[name] for name, entry in names.items()}
    state = _fitted(adapter, untuned)
    if adapter.head:
        state |= head_state(bundle, adapter.head, next(iter(heads.values())))
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        names_of = ", ".join(broken[:_MOST_REASONS])
        raise rejected([f"these tensors are not finite once merged in the model's dtype: {names_of}"])
    return state


def _fitted(adapter: InspectedAdapter, untuned: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole adapter under short names, in memory of its own, given the untuned one under the bundle's names."""
    bundle = adapter.bundle
    tuned = adapter.tensors if adapter.lora is None else merge(adapter.lora, bundle, adapter.tensors, untuned)
    return {
        short_name(bundle, name): tensor.detach().to(untuned[like(name)], copy=True)
        for name, tensor in {**untuned, **tuned}.items()
    }


class _Inspection:
    """One inspection: each step adds to `reasons`, and returns what the next step needs, or None."""

    def __init__(self, folder: Path, bundle: BundleManifest, limits: InspectionLimits) -> None:
        self._folder, self._bundle, self._limits = folder, bundle, limits
        self.reasons: list[str] = []

    def run(self) -> InspectedAdapter | None:
        if not self._small_and_plain():
            return None
        manifest = self._manifest()
        if manifest is None:
            return None
        weights = ADAPTER_FILES[manifest.method][-1]
        config = self._lora_config() if manifest.method == "lora" else None
        header = self._header(weights)
        if header is None or (manifest.method == "lora" and config is None):
            return None
        expected = self._expected(manifest, config)
        if expected is None:
            return None
        self._compare(header, expected)
        self._compare_head(manifest)
        if self.reasons:
            return None
        head = self._load(HEAD_WEIGHTS) if self._bundle.head else {}
        return InspectedAdapter(manifest, self._bundle, self._load(weights), config, head)

    def _small_and_plain(self) -> bool:
        names, problems = list_files(self._folder)
        size = sum((self._folder / name).stat().st_size for name in names)
        if size > self._limits.max_bytes:
            problems.append(f"the files have {size} bytes together; at most {self._limits.max_bytes} are taken")
        if MANIFEST not in names:
            problems.append(f"{MANIFEST} is missing; write the adapter with write_adapter")
        self._refuse(problems)
        self._refuse(reason for reason in map(foreign, names) if reason)
        return not problems

    def _manifest(self) -> AdapterManifest | None:
        try:
            manifest = read_json(AdapterManifest, self._folder / MANIFEST)
        except ArtifactError as error:
            self._refuse([str(error)])
            return None
        self._refuse(self._misfits(manifest))
        changed = check_files(self._folder, manifest.files, [MANIFEST])
        self._refuse(reason for reason in changed if reason not in self.reasons)
        return manifest

    def _misfits(self, manifest: AdapterManifest) -> Iterator[str]:
        bundle = self._bundle
        if manifest.bundle_id != bundle.bundle_id:
            yield f"the adapter belongs to bundle {manifest.bundle_id}, not to {bundle.bundle_id}; tune that one"
        elif (manifest.model, manifest.version) != (bundle.model, bundle.version):
            yield (
                f"{MANIFEST}: model and version are {manifest.model} and {manifest.version}, but bundle "
                f"{bundle.bundle_id} is of {bundle.model} and {bundle.version}"
            )
        if manifest.method not in bundle.methods:
            yield f"{MANIFEST}: method is {manifest.method!r}; the bundle takes {', '.join(bundle.methods)}"
        yield from self._wrong_size(manifest)
        yield from wrong_classes(manifest, bundle, self._limits.max_classes)
        wanted = (*ADAPTER_FILES[manifest.method], *head_files(bundle))
        if set(manifest.files) != set(wanted):
            listed = ", ".join(sorted(manifest.files)) or "nothing"
            yield f"{MANIFEST}: files lists {listed}; the files of {manifest.method} are {', '.join(wanted)}"

    def _wrong_size(self, manifest: AdapterManifest) -> Iterator[str]:
        size, most = manifest.bottleneck, self._limits.max_bottleneck
        if manifest.method != "bottleneck" and size is not None:
            yield f"{MANIFEST}: bottleneck is {size}, but method is {manifest.method!r}, which has none; leave it out"
        elif manifest.method == "bottleneck" and size is None:
            yield f"{MANIFEST}: bottleneck is missing; write the adapter with write_adapter"
        elif size is not None and size > most:
            yield f"{MANIFEST}: bottleneck is {size}; use at most {most}"

    def _lora_config(self) -> LoraAdapterConfig | None:
        path = self._folder / LORA_CONFIG
        if not path.is_file():
            return None
        try:
            config = read_json(LoraAdapterConfig, path)
        except ArtifactError as error:
            self._refuse([str(error)])
            return None
        self._refuse(contradictions(config, self._bundle, self._limits.max_rank))
        return config

    def _header(self, weights: str) -> dict[str, HeaderTensor] | None:
        path = self._folder / weights
        if not path.is_file():
            return None
        try:
            return read_header(path)
        except ArtifactError as error:
            self._refuse([str(error)])
            return None

    def _expected(self, manifest: AdapterManifest, config: LoraAdapterConfig | None) -> Shapes | None:
        if config is not None:
            return lora_shapes(config, self._bundle)
        if (manifest.method == "bottleneck") != (manifest.bottleneck is not None):
            return None
        return plain_shapes(manifest.method, self._bundle, manifest.bottleneck)

    def _compare(self, header: dict[str, HeaderTensor], expected: dict[str, tuple[int, ...]]) -> None:
        self._refuse(f"tensor {name} is missing" for name in sorted(expected.keys() - header.keys()))
        self._refuse(f"tensor {name} is not part of the adapter" for name in sorted(header.keys() - expected.keys()))
        both = sorted(header.keys() & expected.keys())
        self._refuse(
            f"tensor {name} has shape {header[name].shape}, not {expected[name]}"
            for name in both
            if header[name].shape != expected[name]
        )
        self._refuse(
            f"tensor {name} has dtype {header[name].dtype}; use one of {', '.join(_TORCH)}"
            for name in both
            if header[name].dtype not in _TORCH
        )

    def _compare_head(self, manifest: AdapterManifest) -> None:
        if self._bundle.head and manifest.classes is not None:
            header = self._header(HEAD_WEIGHTS)
            if header is not None:
                self._compare(header, head_shapes(self._bundle, len(manifest.classes)))

    def _load(self, weights: str) -> dict[str, torch.Tensor]:
        # Copies, so that nothing that happens to the file later reaches what was inspected.
        tensors = {name: tensor.clone() for name, tensor in load_file(self._folder / weights).items()}
        bad = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in sorted(tensors.items())}
        self._refuse(
            f"tensor {name} holds {count} values that are not finite; tune at a lower learning rate"
            for name, count in bad.items()
            if count
        )
        return tensors

    def _refuse(self, reasons: Iterable[str]) -> None:
        found = list(reasons)
        self.reasons += found[:_MOST_REASONS]
        if len(found) > _MOST_REASONS:
            self.reasons.append(f"and {len(found) - _MOST_REASONS} more of this kind")
