"""Auxiliary models: the small functions beside the sites, one set a customer, as plain tensors.

Fitting them is in fitting.py, making them part of the base's weights in merging.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ot_ray.cola.sites import Site
from ot_ray.config import Config
from ot_ray.errors import GradientLearningError, NotFiniteError


class AuxiliaryConfig(Config):
    """What stands beside every site of a customer (ColA, arXiv 2404.13844, section 3: low rank, linear, MLP)."""

    kind: Literal["low_rank", "linear", "mlp"] = "low_rank"
    """`low_rank`: LoRA's product of two factors. `linear`: a map of the site's own size. `mlp`: two maps and a ReLU."""
    rank: int = Field(default=8, ge=1)
    """Inner width of `low_rank` and `mlp`."""
    alpha: float = Field(default=8.0, gt=0)
    """`low_rank` and `mlp` are multiplied by alpha / rank; `linear` is not."""
    seed: int = Field(default=0, ge=0)
    """Of the random start. The output is zero at the start whatever it is."""

    @property
    def scale(self) -> float:
        """What the output is multiplied by."""
        return 1.0 if self.kind == "linear" else self.alpha / self.rank


class Auxiliary:
    """One customer's auxiliary model: for each site a function f(x), which is added to the site's output.

    `tensors`, named `<site>.<part>`; k is a convolution's kernel (with its axes), absent elsewhere, r the rank:
        `low_rank`: `lora_A.weight` [r, I, *k] and `lora_B.weight` [O, r, *1]; `lora_embedding_A` [r, V] and
            `lora_embedding_B` [O, r] at an embedding. So PEFT calls, shapes and starts LoRA's factors;
        `linear`: `linear.weight` [O, I, *k], or [V, O] at an embedding;
        `mlp`: `inner.weight` [r, I, *k] ([V, r] at an embedding), `inner.bias` [r], `outer.weight` [O, r, *1],
            `outer.bias` [O].

    Args:
        sites: as `find_sites` gives them.
        device, dtype: of the tensors. Outputs are computed in this precision.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        config: AuxiliaryConfig | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sites, self.config = dict(sites), config or AuxiliaryConfig()
        generator = torch.Generator().manual_seed(self.config.seed)
        self.tensors: dict[str, Tensor] = {
            f"{name}.{part}": _start(part, shape, generator).to(device, dtype)
            for name, site in self.sites.items()
            for part, shape in _shapes(site, self.config).items()
        }

    def parts(self, site: str) -> dict[str, Tensor]:
        """The tensors of one site, by their parts' names."""
        return {part: self.tensors[f"{site}.{part}"] for part in _shapes(self.sites[site], self.config)}

    def delta(self, site: str, x: Tensor, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """f(x) at a site.

        Args:
            x: [..., I]; [N, I, *space] at a convolution; int64 [...] at an embedding.
            parts: other tensors than its own.

        Returns:
            [..., O] or [N, O, *space], in the precision of the tensors.
        """
        parts = self.parts(site) if parts is None else parts
        found = self.sites[site]
        inner, outer = _KINDS[self.config.kind]
        y = inner(found, x if found.layout == "embedding" else x.to(next(iter(parts.values())).dtype), parts)
        y = y if outer is None else outer(found, y, parts)
        return y if self.config.scale == 1.0 else y * self.config.scale

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over values, in place; all or none.

        Raises:
            GradientLearningError: the names or shapes are those of another kind, rank or choice of sites.
            NotFiniteError: a value is NaN or infinite.
        """
        check_tensors(tensors, self.tensors)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[name])

    def copy(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Auxiliary:
        """The same values in tensors of its own, without gradients."""
        twin = object.__new__(Auxiliary)
        twin.sites, twin.config = self.sites, self.config
        twin.tensors = {
            n: t.detach().to(device or t.device, dtype or t.dtype, copy=True) for n, t in self.tensors.items()
        }
        return twin


def tensor_shapes(sites: Mapping[str, Site], config: AuxiliaryConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an auxiliary beside these sites has, without making any."""
    return {f"{name}.{part}": shape for name, site in sites.items() for part, shape in _shapes(site, config).items()}


def check_tensors(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes, or that are not finite.

    Raises:
        GradientLearningError: names the first that differs.
        NotFiniteError: names the first that is not finite.
    """
    for name in (*wanted, *given):
        if name not in given or name not in wanted:
            side = "missing" if name not in given else "none of this auxiliary's"
            raise GradientLearningError(
                f"tensor {name} is {side}; give those of the same kind and sites: {_some(wanted)}"
            )
        if given[name].shape != wanted[name].shape or not given[name].is_floating_point():
            raise GradientLearningError(
                f"tensor {name} is {given[name].dtype} {[*given[name].shape]}, not a float {[*wanted[name].shape]}; "
                "give those of the same kind and rank"
            )
        if not given[name].isfinite().all():
            raise NotFiniteError(f"tensor {name} holds NaN or infinity; give values that are finite")


def _some(names: Mapping[str, Tensor]) -> str:
    shown = ", ".join(list(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shapes(site: Site, config: AuxiliaryConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors beside a site; those that come first see x."""
    rank, one = config.rank, (1,) * len(site.kernel)
    table = site.layout == "embedding"
    if config.kind == "low_rank":
        if table:
            return {"lora_embedding_A": (rank, site.inputs), "lora_embedding_B": (site.outputs, rank)}
        return {"lora_A.weight": (rank, site.inputs, *site.kernel), "lora_B.weight": (site.outputs, rank, *one)}
    if config.kind == "linear":
        shape = (site.inputs, site.outputs) if table else (site.outputs, site.inputs, *site.kernel)
        return {"linear.weight": shape}
    return {
        "inner.weight": (site.inputs, rank) if table else (rank, site.inputs, *site.kernel),
        "inner.bias": (rank,),
        "outer.weight": (site.outputs, rank, *one),
        "outer.bias": (site.outputs,),
    }


_RANDOM = {"lora_A.weight", "lora_embedding_B", "inner.weight"}


def _start(part: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Zeros for whatever makes the output zero; the rest as LoRA has it, drawn on the CPU in float32."""
    if part not in _RANDOM:
        return torch.zeros(shape)
    if part == "lora_embedding_B":
        return torch.randn(shape, generator=generator)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _first(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The map that sees x: like the site's own, with another weight ([V, r] at an embedding) and size of output."""
    if site.layout == "embedding":
        y = F.embedding(x, weight)
        return y if bias is None else y + bias
    if site.layout == "conv":
        return _CONVOLVE[len(site.kernel)](x, weight, bias, site.stride, site.padding, site.dilation)
    return F.linear(x, weight, bias)


def _second(site: Site, inner: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The map that sees what comes out of the first."""
    return _CONVOLVE[len(site.kernel)](inner, weight, bias) if site.layout == "conv" else F.linear(inner, weight, bias)


def _low_rank_inner(site: Site, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return _first(site, x, parts["lora_embedding_A"].t() if site.layout == "embedding" else parts["lora_A.weight"])


def _low_rank_outer(site: Site, inner: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return _second(site, inner, parts["lora_embedding_B" if site.layout == "embedding" else "lora_B.weight"])


def _linear(site: Site, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return _first(site, x, parts["linear.weight"])


def _mlp_inner(site: Site, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return F.relu(_first(site, x, parts["inner.weight"], parts["inner.bias"]))


def _mlp_outer(site: Site, inner: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return _second(site, inner, parts["outer.weight"], parts["outer.bias"])


_Map = Callable[[Site, Tensor, Mapping[str, Tensor]], Tensor]
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_KINDS: dict[str, tuple[_Map, _Map | None]] = {
    "low_rank": (_low_rank_inner, _low_rank_outer),
    "linear": (_linear, None),
    "mlp": (_mlp_inner, _mlp_outer),
}
