"""Sites: the maps of a frozen base model that have an auxiliary model beside them, and what their tensors look like.

Hooking into them is left to taps.py, what stands beside them to auxiliaries.py."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from ot_ray.errors import SiteError
from ot_ray.model.packed import PackedLinear

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True)
class Site:
    """One map of the base model. Letters: N positions of any rows, I inputs, O outputs, V entries of a table.

    What is captured there, as `layout` says:
        `linear`: x [N, I], g [N, O];
        `conv`: x [N, I, *space], g [N, O, *space], N whole rows here;
        `embedding`: x int64 [N], g [N, O]; I is V.
    """

    name: str
    """The module's name in the model."""
    layout: Literal["linear", "conv", "embedding"]
    inputs: int
    outputs: int
    transposed: bool = False
    """The base weight is [I, O], as in GPT-2's `Conv1D`, or [V, O]."""
    kernel: tuple[int, ...] = ()
    """Of a convolution, as are the rest."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()


def find_sites(model: nn.Module, patterns: str | Iterable[str]) -> dict[str, Site]:
    """The sites whose names match.

    Args:
        patterns: shell patterns for whole module names (`*.q_proj`, `model.layers.[01].mlp.*`). `*` goes across dots.

    Returns:
        Sites by their names, in the model's order.

    Raises:
        SiteError: a pattern matches no module (the nearest names are given), or none that can be a site; or a module
            of an exact name cannot be one.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, Site] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        if not matched:
            raise SiteError(f"site pattern {pattern!r} matches no module; {_nearest(pattern, modules)}")
        sites = [site_of(name, modules[name]) for name in matched if pattern == name or _is_map(modules[name])]
        if not sites:
            raise SiteError(
                f"site pattern {pattern!r} matches {matched[0]} ({type(modules[matched[0]]).__name__}), but no linear "
                f"map, convolution or embedding; {_nearest(pattern, modules)}"
            )
        found |= {site.name: site for site in sites}
    return {name: found[name] for name in modules if name in found}


def site_of(name: str, module: nn.Module) -> Site:
    """What a module is as a site.

    Raises:
        SiteError: it is none, or a kind of it that no auxiliary can follow (grouped convolutions, reflected padding,
            embeddings that change their input or renormalize).
    """
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return Site(name, "linear", inputs, outputs, transposed=True)
    if isinstance(module, PackedLinear) and module.up is not None:
        raise SiteError(f"{name} is a packed map of low rank, which multiplies twice; choose another site")
    if isinstance(module, nn.Linear | PackedLinear):
        return Site(name, "linear", module.in_features, module.out_features)
    if isinstance(module, tuple(_CONVOLUTIONS)):
        return _convolution(name, module)
    if isinstance(module, nn.Embedding):
        if type(module).forward is not nn.Embedding.forward or module.max_norm is not None:
            raise SiteError(f"{name} ({type(module).__name__}) does more than look up a table; choose another site")
        return Site(name, "embedding", module.num_embeddings, module.embedding_dim, transposed=True)
    raise SiteError(f"{name} is a {type(module).__name__}; a site is a linear map, Conv1D, convolution or embedding")


def _convolution(name: str, module: nn.Module) -> Site:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if module.groups != 1 or module.padding_mode != "zeros":
        raise SiteError(
            f"{name} has groups={module.groups} and padding_mode={module.padding_mode!r}; a convolution is a site with "
            "one group and zeros around it; choose another"
        )
    return Site(
        name,
        "conv",
        module.in_channels,
        module.out_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
        dilation=tuple(module.dilation),
    )


def _is_map(module: nn.Module) -> bool:
    try:
        return bool(site_of("", module))
    except SiteError:
        return False


def _nearest(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """The names that a person may have meant: near as a whole, or in their last part."""
    names = [name for name, module in modules.items() if _is_map(module)]
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.6)
    near += [last[part] for part in difflib.get_close_matches(pattern.rpartition(".")[2], last, n=3, cutoff=0.5)]
    shown = list(dict.fromkeys(near)) or names[:3]
    return f"the nearest that could be sites: {', '.join(shown)}" if shown else "the model has none that could be sites"
