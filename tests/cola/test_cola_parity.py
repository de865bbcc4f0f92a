"""What is fitted against back-propagation through the same auxiliaries inside a plain model, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    Collaboration,
    Fitter,
    FittingConfig,
    Joint,
    Mode,
    Pair,
    Taps,
    find_sites,
    gradients,
    surrogate,
)
from tests.cola.inside import (
    ALPHA,
    KINDS,
    RANK,
    ImageNet,
    OneInside,
    TextNet,
    inputs,
    net,
    row_losses,
    tensors_of,
    with_inside,
)

NETS = (TextNet, ImageNet)
MODES = ("joint", "alone", "collaboration", "weighted")
CUSTOMERS = ("ada", "bob", "cyd")
ROWS = ("bob", "ada", "cyd", "bob", "ada")
WEIGHTS = {"ada": 0.7, "bob": -0.2, "cyd": 0.5}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def loaded(model: nn.Module, ones: dict[str, OneInside], kind: str, rank: int) -> Auxiliary:
    """The auxiliary that has the values of those inside."""
    sites = find_sites(model, list(ones))
    auxiliary = Auxiliary(sites, AuxiliaryConfig(kind=kind, rank=rank, alpha=ALPHA), dtype=torch.float64)
    given = tensors_of(ones)
    auxiliary.load(
        {
            f"{site}.{part}": tensor
            for site in sites
            for part, tensor in zip(auxiliary.parts(site), given[site], strict=True)
        }
    )
    return auxiliary


def mode_of(name: str, auxiliaries: dict[str, Auxiliary]) -> Mode:
    if name == "joint":
        return Joint(auxiliaries["joint"])
    if name == "alone":
        return Alone(auxiliaries)
    return Collaboration(auxiliaries, WEIGHTS if name == "weighted" else None)


def shares_of(name: str) -> dict[str, float] | None:
    """What the reference multiplies by; None where each row has its own."""
    if name == "joint":
        return {"joint": 1.0}
    return {"alone": None, "collaboration": dict.fromkeys(CUSTOMERS, 1 / 3), "weighted": WEIGHTS}[name]


def scene(
    net_class: type[nn.Module], kinds: dict[str, tuple[str, int]], mode: str
) -> tuple[nn.Module, nn.Module, dict, dict]:
    """A base, its twin with auxiliaries inside, those, and ours with the same values."""
    base = net(net_class)
    twin, ones = with_inside(base, net_class.patterns, kinds, ROWS, shares_of(mode))
    return base, twin, ones, {name: loaded(base, ones[name], *kinds[name]) for name in kinds}


def expected(twin: nn.Module, ones: dict, batches: list[Tensor], mode: str) -> dict[str, dict[str, list[Tensor]]]:
    """By customer and site: the gradient, summed over batches, of the loss of the customer's own rows."""
    found = {}
    for name, own in ones.items():
        twin.zero_grad()
        for batch in batches:
            losses = row_losses(twin(batch))
            mine = [row for row, customer in enumerate(ROWS) if mode == "joint" or customer == name]
            losses[mine].sum().backward()
        found[name] = tensors_of(own, gradients=True)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net_class", NETS)
@pytest.mark.parametrize("interval", [1, 3])
def test_the_fitted_gradient_is_back_propagations(
    net_class: type[nn.Module], kind: str, mode: str, interval: int
) -> None:
    names = ("joint",) if mode == "joint" else CUSTOMERS
    base, twin, ones, auxiliaries = scene(net_class, dict.fromkeys(names, (kind, RANK)), mode)
    batches = [inputs(net_class, len(ROWS), seed) for seed in range(interval)]
    wanted = expected(twin, ones, batches, mode)
    before = {name: auxiliary.copy() for name, auxiliary in auxiliaries.items()}
    fitters = {
        name: Fitter(auxiliary, lambda tensors: torch.optim.SGD(tensors, lr=1.0), FittingConfig(interval=interval))
        for name, auxiliary in auxiliaries.items()
    }
    with Taps(base, find_sites(base, net_class.patterns), mode_of(mode, auxiliaries)) as taps:
        for number, batch in enumerate(batches):
            with taps.batch(ROWS) as passed:
                logits = base(batch)
                row_losses(logits).sum().backward()
            torch.testing.assert_close(logits, twin(batch), **EXACT)
            for name, pairs in passed.pairs().items():
                assert fitters[name].collect(pairs) == (number == interval - 1)
    for name, auxiliary in auxiliaries.items():
        for site in auxiliary.sites:
            moved = zip(before[name].parts(site).values(), auxiliary.parts(site).values(), strict=True)
            # One step of plain descent at rate 1 is the gradient.
            for (old, new), gradient in zip(moved, wanted[name][site], strict=True):
                assert gradient.abs().max() > 1e-6
                torch.testing.assert_close(old - new, gradient, **EXACT)


@pytest.mark.parametrize("mode", ["alone", "collaboration"])
@pytest.mark.parametrize("net_class", NETS)
def test_customers_have_kinds_and_ranks_of_their_own(net_class: type[nn.Module], mode: str) -> None:
    kinds = {"ada": ("low_rank", 2), "bob": ("mlp", 4), "cyd": ("linear", 1)}
    base, twin, ones, auxiliaries = scene(net_class, kinds, mode)
    batch = inputs(net_class, len(ROWS))
    wanted = expected(twin, ones, [batch], mode)
    taps = Taps(base, find_sites(base, net_class.patterns), mode_of(mode, auxiliaries))
    with taps, taps.batch(ROWS) as passed:
        row_losses(base(batch)).sum().backward()
    for name, pairs in passed.pairs().items():
        found = gradients(auxiliaries[name], pairs)
        for site in auxiliaries[name].sites:
            for part, gradient in zip(auxiliaries[name].parts(site), wanted[name][site], strict=True):
                torch.testing.assert_close(found[f"{site}.{part}"], gradient, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_papers_surrogate(kind: str) -> None:
    base, _, _, auxiliaries = scene(TextNet, {"joint": (kind, RANK)}, "joint")
    auxiliary = auxiliaries["joint"]
    with Taps(base, auxiliary.sites, Joint(auxiliary)) as taps, taps.batch() as passed:
        row_losses(base(inputs(TextNet, len(ROWS)))).sum().backward()
    pairs = passed.pairs()["joint"]
    found = gradients(auxiliary, pairs)
    leaves = auxiliary.copy()
    for tensor in leaves.tensors.values():
        tensor.requires_grad_(True)
    losses = [surrogate(leaves.delta(site, pair.x), pair.g) for site, pair in pairs.items()]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(
        torch.stack(losses), torch.stack([0.5 * pair.g.square().sum() for pair in pairs.values()])
    )
    for name, tensor in leaves.tensors.items():
        torch.testing.assert_close(found[name], tensor.grad, **EXACT)


def test_a_small_gradient_beside_a_large_output_keeps_its_digits() -> None:
    sites = find_sites(net(TextNet), "plain")
    exact = Auxiliary(sites, AuxiliaryConfig(kind="linear"), dtype=torch.float64)
    exact.load({"plain.linear.weight": torch.full((6, 5), 30.0, dtype=torch.float64)})
    single = exact.copy(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, g = torch.rand(64, 5, generator=generator), torch.randn(64, 6, generator=generator) * 1e-5
    wanted = (g.double().mT @ x.double()).float()

    def error(found: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    direct = gradients(single, {"plain": Pair(x, g)})["plain.linear.weight"]
    weight = single.tensors["plain.linear.weight"].requires_grad_(True)
    surrogate(single.delta("plain", x), g).backward()
    assert weight.grad is not None
    assert error(direct) < 1e-5 < 1e-2 < error(weight.grad)
