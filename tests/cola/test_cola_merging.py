"""Merging at every type of site, without drift, and what cannot be merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ot_ray.cola import Auxiliary, AuxiliaryConfig, Joint, Merging, Taps, dequantize, find_sites, weight_delta
from ot_ray.errors import MergeError, NotFiniteError, SiteError
from ot_ray.model import PackedFormat, PackedLinear
from tests.cola.inside import ImageNet, TextNet, inputs, net
from tests.fixtures.models import tiny_model


def stirred(auxiliary: Auxiliary, seed: int = 0, size: float = 0.3) -> Auxiliary:
    generator = torch.Generator().manual_seed(seed)
    for tensor in auxiliary.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
    return auxiliary


@pytest.mark.parametrize("kind", ["low_rank", "linear"])
@pytest.mark.parametrize("net_class", [TextNet, ImageNet])
def test_merged_is_unmerged_at_every_type_of_site(net_class: type[nn.Module], kind: str) -> None:
    model, given = net(net_class), inputs(net_class)
    sites = find_sites(model, net_class.patterns)
    ours = stirred(Auxiliary(sites, AuxiliaryConfig(kind=kind, rank=3), dtype=torch.float64))
    with torch.no_grad():
        base = model(given)
        with Taps(model, sites, Joint(ours)):
            unmerged = model(given)
        with Merging(model, sites) as merging:
            merging.merge([(1.0, ours)])
            torch.testing.assert_close(model(given), unmerged, rtol=1e-10, atol=1e-12)
            merging.merge([])
            assert torch.equal(model(given), base)
    assert (unmerged - base).abs().max() > 1e-2


@pytest.mark.parametrize("net_class", [TextNet, ImageNet])
def test_many_merge_as_one_after_another(net_class: type[nn.Module]) -> None:
    model = net(net_class)
    sites = find_sites(model, net_class.patterns)
    few = dict(list(sites.items())[1:])
    kinds = [("low_rank", 2, sites), ("linear", 1, sites), ("low_rank", 5, few), ("low_rank", 3, sites)]
    summands = [
        (
            0.3 * (place - 1.5),
            stirred(Auxiliary(there, AuxiliaryConfig(kind=kind, rank=rank), dtype=torch.float64), place),
        )
        for place, (kind, rank, there) in enumerate(kinds)
    ]
    wanted = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in sites}
    for share, auxiliary in summands:
        for name in auxiliary.sites:
            wanted[name] += share * weight_delta(auxiliary, name).reshape(wanted[name].shape)
    with Merging(model, sites) as merging:
        merging.merge(summands)
        for name, weight in wanted.items():
            torch.testing.assert_close(model.get_parameter(f"{name}.weight").detach(), weight, rtol=1e-12, atol=1e-12)


def test_ten_thousand_intervals_in_bf16_do_not_drift() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).bfloat16()
    clean = copy.deepcopy(model.state_dict())
    sites = find_sites(model, "0")
    ours = [stirred(Auxiliary(sites, AuxiliaryConfig(rank=2)), seed, 0.1) for seed in range(4)]
    deltas = [one.tensors["0.lora_B.weight"] @ one.tensors["0.lora_A.weight"] * 4 for one in ours]
    with Merging(model, sites) as merging:
        for interval in range(10_000):
            merging.merge([(1.0, ours[interval % 4])])
        assert torch.equal(model.get_parameter("0.weight"), (clean["0.weight"].float() + deltas[3]).bfloat16())
    assert all(torch.equal(tensor, clean[name]) for name, tensor in model.state_dict().items())
    # Adding and subtracting drifts on these very numbers.
    added = clean["0.weight"].clone()
    for delta in deltas:
        added = added + delta.bfloat16() - delta.bfloat16()
    assert not torch.equal(added, clean["0.weight"])


def test_mlps_cannot_be_merged() -> None:
    model = net(TextNet)
    sites = find_sites(model, ["gpt", "plain"])
    before = copy.deepcopy(model.state_dict())
    low_rank, mlp = (stirred(Auxiliary(sites, AuxiliaryConfig(kind=kind))) for kind in ("low_rank", "mlp"))
    with Merging(model, sites) as merging:
        with pytest.raises(MergeError, match=r"gpt is an mlp.*low_rank or linear"):
            merging.merge([(0.5, low_rank), (0.5, mlp)])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_would_not_be_finite_is_not_merged() -> None:
    model = net(TextNet).half()
    sites = find_sites(model, ["gpt", "plain"])
    large = Auxiliary(sites, AuxiliaryConfig(kind="linear"))
    large.tensors["plain.linear.weight"].fill_(1e6)
    large.tensors["gpt.linear.weight"].fill_(1.0)
    before = copy.deepcopy(model.state_dict())
    with Merging(model, sites, device="cpu") as merging:
        with pytest.raises(NotFiniteError, match="plain"):
            merging.merge([(1.0, large)])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shared_weights_cannot_be_merged() -> None:
    model = tiny_model("gpt2", depth=1)
    with pytest.raises(MergeError, match=r"transformer\.wte is that of lm_head\.weight, too"):
        Merging(model, find_sites(model, "transformer.wte"))


def test_other_sites_cannot_be_merged() -> None:
    model = net(TextNet)
    plain, both = find_sites(model, "plain"), find_sites(model, ["plain", "gpt"])
    with pytest.raises(MergeError, match="site gpt, of which no clean copy"):
        Merging(model, plain).merge([(1.0, Auxiliary(both))])
    with pytest.raises(SiteError, match="no module plain"):
        Merging(nn.Sequential(), plain)
    model.plain = nn.Linear(3, 3)
    with pytest.raises(SiteError, match="another kind of module"):
        Merging(model, plain)


def packed_model() -> nn.Module:
    torch.manual_seed(0)
    maps = [nn.Linear(16, 8), nn.Linear(8, 8)]
    format = PackedFormat(first_layer=0, layers=1, bits=4, group_size=8)
    return nn.Sequential(PackedLinear.of(maps[0].weight, maps[0].bias, format), nn.Tanh(), maps[1])


def test_packed_weights_are_merged_knowingly_only() -> None:
    model, x = packed_model(), torch.randn(5, 16)
    sites = find_sites(model, ["0", "2"])
    ours = stirred(Auxiliary(sites, AuxiliaryConfig(rank=2)))
    with Taps(model, sites, Joint(ours)) as taps, taps.batch() as batch:
        unmerged = model(x)
        unmerged.sum().backward()
    assert batch.pairs()["joint"]["0"].x.shape == (5, 16)
    with pytest.raises(MergeError, match=r"weight of 0 is packed.*dequantize"):
        Merging(model, sites)
    with torch.no_grad():
        base = model(x)
        assert dequantize(model, sites) == ["0"]
        torch.testing.assert_close(model(x), base)
        with Merging(model, sites) as merging:
            merging.merge([(1.0, ours)])
            torch.testing.assert_close(model(x), unmerged)


def test_quantized_weights_cannot_be_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MergeError, match=r"weight of 0 is torch\.int8 .*quantized"):
        Merging(model, find_sites(model, "0"))
