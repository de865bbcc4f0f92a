"""Auxiliaries made part of the base model's weights, always from a clean copy, so that nothing adds up.

Kinds that are no linear map of x are refused; whose auxiliaries may be merged together is in modes.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ot_ray.cola.auxiliaries import Auxiliary
from ot_ray.cola.sites import Site, site_of
from ot_ray.errors import MergeError, NotFiniteError, SiteError
from ot_ray.model.packed import PackedLinear


class Merging:
    """Keeps clean copies of the base's weights at some sites; while open, the weights hold what was merged last.

    Each merge writes ``clean + sum(share * delta)``, added in float32 (float64 weights: in float64) and rounded once.
    The weights are the clean ones, bit by bit, when it closes.

    Args:
        sites: of this model; auxiliaries that are merged may have fewer.
        device: where the clean copies are kept; unset, beside the weights.

    Raises:
        MergeError: a site's weight is packed, quantized or sharded, or shared with another module (a tied embedding).
        SiteError: a site is not one of the model's.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], device: torch.device | str | None = None) -> None:
        self._sites = dict(sites)
        self._weights = {name: _weight(model, site) for name, site in self._sites.items()}
        _refuse_shared(model, self._weights)
        self._clean = {
            name: weight.detach().to(device or weight.device, copy=True) for name, weight in self._weights.items()
        }

    def __enter__(self) -> Merging:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def merge(self, summands: Iterable[tuple[float, Auxiliary]]) -> None:
        """Put auxiliaries into the weights, in the place of whatever was merged; all or nothing.

        Args:
            summands: each with its share, as a mode's `summands()` gives them.

        Raises:
            MergeError: an auxiliary is an MLP, or has a site that is not kept here.
            NotFiniteError: a weight would not be finite.
        """
        summands = list(summands)
        for _, auxiliary in summands:
            if unknown := [name for name in auxiliary.sites if self._sites.get(name) != auxiliary.sites[name]]:
                raise MergeError(
                    f"the auxiliary has site {unknown[0]}, of which no clean copy is kept; name it here, too"
                )
        merged = {name: self._merged(name, summands) for name in self._sites}
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(merged[name])

    def restore(self) -> None:
        """Put the clean weights back."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._clean[name])

    def _merged(self, name: str, summands: list[tuple[float, Auxiliary]]) -> Tensor:
        weight = self._weights[name]
        precise = torch.promote_types(weight.dtype, torch.float32)
        total = self._clean[name].to(weight.device, precise)
        here = [(share, auxiliary) for share, auxiliary in summands if name in auxiliary.sites]
        low = [summand for summand in here if summand[1].config.kind == "low_rank"]
        if len(low) > 1:
            total = total + _joint_delta(low, self._sites[name], weight.device, precise)
            here = [summand for summand in here if summand[1].config.kind != "low_rank"]
        for share, auxiliary in here:
            delta = weight_delta(auxiliary, name, weight.device, precise)
            total = total + share * delta.reshape(total.shape)
        total = total.to(weight.dtype)
        if not total.isfinite().all():
            raise NotFiniteError(f"the merged weight of {name} would not be finite; nothing was merged")
        return total


def weight_delta(
    auxiliary: Auxiliary, site: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """What an auxiliary adds to the weight of a site, in the layout of the base's weight: [O, I], [I, O] in `Conv1D`,
    [O, I, *k] in a convolution, [V, O] in an embedding.

    Raises:
        MergeError: it is an MLP, which no weight can hold.
    """
    if auxiliary.config.kind == "mlp":
        raise MergeError(
            f"the auxiliary at {site} is an mlp, which is no linear map and cannot be merged; leave it unmerged, or "
            "use kind low_rank or linear"
        )
    found = auxiliary.sites[site]
    tensors = {part: tensor.detach().to(device, dtype) for part, tensor in auxiliary.parts(site).items()}
    if auxiliary.config.kind == "linear":
        delta = tensors["linear.weight"]
        return delta.t() if found.transposed and found.layout != "embedding" else delta
    inner, outer = tensors.values()
    delta = (outer.flatten(1) @ inner.flatten(1)).reshape(found.outputs, found.inputs, *found.kernel)
    delta = delta * auxiliary.config.scale
    return delta.t() if found.transposed else delta


def _joint_delta(
    summands: list[tuple[float, Auxiliary]], site: Site, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The sum of what auxiliaries of low rank add, by one product for all."""
    inner, outer = [], []
    for share, auxiliary in summands:
        first, second = (tensor.detach().to(device, dtype).flatten(1) for tensor in auxiliary.parts(site.name).values())
        inner.append(first)
        outer.append(second * (share * auxiliary.config.scale))
    delta = (torch.cat(outer, 1) @ torch.cat(inner)).reshape(site.outputs, site.inputs, *site.kernel)
    return delta.t() if site.transposed else delta


def dequantize(model: nn.Module, sites: Mapping[str, Site], dtype: torch.dtype = torch.float32) -> list[str]:
    """Put linear maps with dense weights in the place of packed ones, for good, so that sites can be merged.

    Args:
        dtype: of the dense weights, which take ``dtype.itemsize`` bytes each.

    Returns:
        The names of those that were packed. Open taps and merging after it, not before.
    """
    packed = [name for name in sites if isinstance(model.get_submodule(name), PackedLinear)]
    for name in packed:
        module = model.get_submodule(name)
        assert isinstance(module, PackedLinear)
        bias = module.bias
        dense = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta", dtype=dtype)
        dense.weight = nn.Parameter(module.dense(dtype), requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, dense.train(module.training))
    return packed


def _weight(model: nn.Module, site: Site) -> Tensor:
    try:
        module = model.get_submodule(site.name)
    except AttributeError:
        raise SiteError(f"the model has no module {site.name}; find its sites with find_sites(model, ...)") from None
    if isinstance(module, PackedLinear):
        raise MergeError(
            f"the weight of {site.name} is packed; leave its auxiliary unmerged, or make it dense for good with "
            "dequantize(model, sites)"
        )
    if hasattr(getattr(module, "weight", None), "ds_shape"):
        raise MergeError(
            f"the weight of {site.name} is sharded over processes (ZeRO-3), none of which has the whole; leave its "
            "auxiliary unmerged, or run the base in one process"
        )
    if site_of(site.name, module) != site:
        raise SiteError(f"{site.name} is another kind of module than the site says; find the sites of this model")
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or weight.itemsize < 2 or weight.shape != _shape(site):
        raise MergeError(
            f"the weight of {site.name} is {weight.dtype} {[*weight.shape]}, which is quantized; leave its auxiliary "
            "unmerged, or load the model in bfloat16"
        )
    return weight


def _shape(site: Site) -> tuple[int, ...]:
    return (site.inputs, site.outputs) if site.transposed else (site.outputs, site.inputs, *site.kernel)


def _refuse_shared(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(parameter.data_ptr(), []).append(name)
    for name, weight in weights.items():
        others = [holder for holder in holders[weight.data_ptr()] if holder != f"{name}.weight"]
        if others:
            raise MergeError(
                f"the weight of {name} is that of {others[0]}, too, which would change with it; leave its auxiliary "
                "unmerged, or untie the weights"
            )
