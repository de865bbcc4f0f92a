"""Intervals, schedules, resuming and refusals of a fitter, beside plain PyTorch optimisers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from ot_ray.cola import Auxiliary, AuxiliaryConfig, Fitter, FittingConfig, Pair, Site
from ot_ray.errors import GradientLearningError, NotFiniteError

SITES = {"one": Site("one", "linear", 5, 4), "two": Site("two", "linear", 4, 3)}


def adamw(tensors: list[Tensor]) -> Optimizer:
    return torch.optim.AdamW(tensors, lr=0.05)


def halving(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def auxiliary(kind: str = "linear", rank: int = 2) -> Auxiliary:
    return Auxiliary(SITES, AuxiliaryConfig(kind=kind, rank=rank, seed=3), dtype=torch.float64)


def pairs(seed: int, size: int = 6) -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(width: int) -> Tensor:
        return torch.randn(size, width, generator=generator, dtype=torch.float64)

    return {name: Pair(drawn(site.inputs), drawn(site.outputs)) for name, site in SITES.items()}


def snapshot(fitter: Fitter) -> bytes:
    """All of a fitter's state."""
    buffer = io.BytesIO()
    torch.save(fitter.state_dict(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("make", [adamw, lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9)])
def test_intervals_and_what_is_left_of_them(make: Callable[[list[Tensor]], Optimizer], reduction: str) -> None:
    fitter = Fitter(auxiliary(), make, FittingConfig(interval=3, reduction=reduction), halving)
    made = [fitter.collect(pairs(seed)) for seed in range(7)]
    assert made == [False, False, True] * 2 + [False]
    assert fitter.collected == 1 and fitter.flush() and not fitter.flush()
    assert fitter.steps == 3

    # A linear auxiliary's gradient is the sum of outer products; the last interval has one batch.
    weights = {name: torch.zeros(site.outputs, site.inputs, dtype=torch.float64) for name, site in SITES.items()}
    optimizer = make(list(weights.values()))
    for step, seeds in enumerate([(0, 1, 2), (3, 4, 5), (6,)]):
        optimizer.param_groups[0]["lr"] = fitter.optimizer.param_groups[0]["initial_lr"] * 0.5**step
        for name, weight in weights.items():
            weight.grad = sum(pairs(seed)[name].g.t() @ pairs(seed)[name].x for seed in seeds)
            weight.grad /= len(seeds) if reduction == "mean" else 1
        optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(
            fitter.auxiliary.tensors[f"{name}.linear.weight"].detach(), weight, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_what_is_resumed_goes_on_to_the_last_bit(kind: str) -> None:
    def made() -> Fitter:
        return Fitter(auxiliary(kind), adamw, FittingConfig(interval=2), halving)

    straight, first = made(), made()
    for seed in range(9):
        straight.collect(pairs(seed))
    for seed in range(5):
        first.collect(pairs(seed))
    # What is kept is plain enough for the reader that runs no code.
    state = torch.load(io.BytesIO(snapshot(first)), weights_only=True)
    kept, second = copy.deepcopy(state), made()
    second.load_state_dict(state)
    assert second.collected == 1 and second.steps == 2
    for fitter in (first, second):
        for seed in range(5, 9):
            fitter.collect(pairs(seed))
    for fitter in (straight, first, second):
        fitter.flush()
        for name, tensor in fitter.auxiliary.tensors.items():
            assert torch.equal(tensor, straight.auxiliary.tensors[name])
    # Neither what was read nor what was written changes with the fitter.
    assert all(torch.equal(tensor, kept["auxiliary"][name]) for name, tensor in state["auxiliary"].items())


@pytest.mark.parametrize("what", ["x", "g"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_nothing(what: str, value: float) -> None:
    fitter = Fitter(auxiliary("low_rank"), adamw, FittingConfig(interval=2), halving)
    for seed in range(3):
        fitter.collect(pairs(seed))
    before, bad = snapshot(fitter), pairs(3)
    getattr(bad["two"], what)[1, 1] = value
    with pytest.raises(NotFiniteError, match=f"{what} at site two"):
        fitter.collect(bad)
    assert snapshot(fitter) == before
    # The interval goes on.
    assert fitter.collect(pairs(4))


def test_a_gradient_that_overflows_changes_nothing() -> None:
    fitter = Fitter(Auxiliary(SITES, AuxiliaryConfig(kind="linear")), adamw)
    before = snapshot(fitter)
    large = {name: Pair(pair.x.float() * 1e30, pair.g.float() * 1e30) for name, pair in pairs(0).items()}
    with pytest.raises(NotFiniteError, match=r"gradient of one\.linear\.weight"):
        fitter.collect(large)
    assert snapshot(fitter) == before


def test_other_sites_and_shapes_are_refused() -> None:
    fitter, good = Fitter(auxiliary(), adamw), pairs(0)
    before = snapshot(fitter)
    cases = {
        "no pair came for site two": {"one": good["one"]},
        "a pair came for site odd": {**good, "odd": good["one"]},
        r"x at site one is torch.float64 \[6, 4\]": {**good, "one": good["two"]},
        r"g at site two is \[6, 4\], but f\(x\) is \[6, 3\]": {**good, "two": Pair(good["two"].x, good["one"].g)},
        r"g at site one is \[2, 4\]": {**good, "one": Pair(good["one"].x, good["one"].g[:2])},
    }
    for message, given in cases.items():
        with pytest.raises(GradientLearningError, match=message):
            fitter.collect(given)
    assert snapshot(fitter) == before


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_customers_without_a_position_have_no_gradient(kind: str) -> None:
    fitter = Fitter(auxiliary(kind), lambda tensors: torch.optim.SGD(tensors, lr=1.0))
    before = fitter.auxiliary.copy()
    assert fitter.collect(pairs(0, size=0))
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in fitter.auxiliary.tensors.items())


def test_optimisers_with_a_closure_are_refused() -> None:
    with pytest.raises(GradientLearningError, match="LBFGS"):
        Fitter(auxiliary(), torch.optim.LBFGS)


def test_states_and_tensors_of_others_are_refused() -> None:
    fitter = Fitter(auxiliary("low_rank"), adamw)
    before = snapshot(fitter)
    for other in (auxiliary("mlp"), auxiliary("low_rank", rank=3)):
        with pytest.raises(GradientLearningError, match=r"tensor one\.\w+"):
            fitter.load_state_dict(Fitter(other, adamw).state_dict())
        with pytest.raises(GradientLearningError, match=r"tensor one\.\w+"):
            fitter.auxiliary.load(other.tensors)
    with pytest.raises(GradientLearningError, match="schedule"):
        fitter.load_state_dict(Fitter(auxiliary("low_rank"), adamw, schedule=halving).state_dict())
    broken = auxiliary("low_rank")
    broken.tensors["two.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"two\.lora_B\.weight"):
        fitter.auxiliary.load(broken.tensors)
    whole = dict.fromkeys(fitter.auxiliary.tensors, torch.zeros((), dtype=torch.int64))
    with pytest.raises(GradientLearningError, match="int64"):
        fitter.auxiliary.load(whole)
    assert snapshot(fitter) == before


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_auxiliaries_start_at_zero_and_by_their_seed(kind: str) -> None:
    sites = {
        "map": Site("map", "linear", 5, 4),
        "conv": Site("conv", "conv", 3, 2, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
        "table": Site("table", "embedding", 7, 4, transposed=True),
    }
    made = Auxiliary(sites, AuxiliaryConfig(kind=kind, seed=5))
    inputs = {"map": torch.randn(3, 5), "conv": torch.randn(2, 3, 6, 6), "table": torch.arange(7)}
    for site, x in inputs.items():
        assert not made.delta(site, x).any()
    same, other = Auxiliary(sites, AuxiliaryConfig(kind=kind, seed=5)), Auxiliary(sites, AuxiliaryConfig(kind=kind))
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in made.tensors.items())
    if kind != "linear":
        assert not all(torch.equal(tensor, other.tensors[name]) for name, tensor in made.tensors.items())


def test_low_rank_is_multiplied_by_alpha_over_rank() -> None:
    made = Auxiliary(SITES, AuxiliaryConfig(rank=4, alpha=32), dtype=torch.float64)
    made.load({name: torch.ones_like(tensor) for name, tensor in made.tensors.items()})
    x = torch.randn(2, 5, dtype=torch.float64)
    a, b = made.parts("one").values()
    torch.testing.assert_close(made.delta("one", x), 8 * F.linear(F.linear(x, a), b))
