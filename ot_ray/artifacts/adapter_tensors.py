"""Which tensors the file of an adapter holds, method by method, under the bundle's names.

LoRA's are in lora.py; writing a file is in adapter.py, refusing one in inspection.py."""

from __future__ import annotations

from collections.abc import Callable

from ot_ray.artifacts.manifest import BundleManifest
from ot_ray.model import FAMILIES, Method
from ot_ray.model.bottleneck import CHILD, bottleneck_places, bottleneck_shapes, output_width

Shapes = dict[str, tuple[int, ...]]


def full_name(bundle: BundleManifest, short: str) -> str:
    """The bundle's name of a tensor that `adapter_state` calls ``layers.<position>.<name>``."""
    return f"{FAMILIES[bundle.model_type].layers}{short.removeprefix('layers')}"


def short_name(bundle: BundleManifest, full: str) -> str:
    """The name that `adapter_state` gives a tensor of the bundle's adapter."""
    return f"layers{full.removeprefix(FAMILIES[bundle.model_type].layers)}"


def plain_shapes(method: Method, bundle: BundleManifest, size: int | None = None) -> Shapes:
    """Names and shapes of all tensors of `adapter.safetensors`, for every method but `lora`.

    Args:
        size: width of the bottlenecks, for method `bottleneck`.
    """
    return _SHAPES[method](bundle, size)


def bottleneck_hosts(bundle: BundleManifest) -> dict[str, int]:
    """The bundle's names of the linear maps that get a bottleneck, each with the width of its output."""
    family = FAMILIES[bundle.model_type]
    shapes = {entry.name: entry.shape for entry in bundle.adapter}
    hosts = (
        f"{family.layers}.{position}.{place}"
        for position in bundle.plan.adapter_positions(bundle.plan.depth)
        for place in bottleneck_places(family)
    )
    return {host: output_width(family, shapes[f"{host}.weight"]) for host in hosts}


def like(name: str) -> str:
    """The bundle's name of the tensor whose type and device a tensor of an adapter takes: its own, or, for one of a
    bottleneck, that of the linear map's weight."""
    host, inside, _ = name.partition(f".{CHILD}.")
    return f"{host}.weight" if inside else name


def _full(bundle: BundleManifest, size: int | None) -> Shapes:
    return {entry.name: entry.shape for entry in bundle.adapter}


def _bitfit(bundle: BundleManifest, size: int | None) -> Shapes:
    return {entry.name: entry.shape for entry in bundle.adapter if len(entry.shape) == 1}


def _bottleneck(bundle: BundleManifest, size: int | None) -> Shapes:
    assert size is not None
    return {
        f"{host}.{name}": shape
        for host, width in bottleneck_hosts(bundle).items()
        for name, shape in bottleneck_shapes(width, size)
    }


_SHAPES: dict[Method, Callable[[BundleManifest, int | None], Shapes]] = {
    "full": _full,
    "bitfit": _bitfit,
    "bottleneck": _bottleneck,
}
