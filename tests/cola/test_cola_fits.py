"""Batches in order and once each, and states that a file holds, beside fitters that are called by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ot_ray.cola import (
    Auxiliary,
    AuxiliaryConfig,
    FitConfig,
    Fits,
    Fitter,
    Pair,
    Site,
    make_fitter,
    pack_state,
    unpack_state,
)
from ot_ray.errors import GradientLearningError, NotFiniteError

SITES = {"one": Site("one", "linear", 5, 4), "two": Site("two", "linear", 4, 3)}
CONFIGS = {
    "adamw": FitConfig(lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), interval=2),
    "momentum": FitConfig(optimizer="sgd", lr=0.1, momentum=0.9, interval=2, reduction="mean"),
    "schedule": FitConfig(lr=0.05, schedule="cosine", warmup_fits=2, fits=6),
    "plain": FitConfig(optimizer="sgd", lr=0.1, schedule="linear", fits=4),
}


def auxiliary(seed: int = 3) -> Auxiliary:
    return Auxiliary(SITES, AuxiliaryConfig(rank=2, seed=seed))


def pairs(seed: int) -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(width: int) -> Tensor:
        return torch.randn(6, width, generator=generator)

    return {name: Pair(drawn(site.inputs), drawn(site.outputs)) for name, site in SITES.items()}


def fits(config: FitConfig = CONFIGS["adamw"]) -> Fits:
    return Fits({name: make_fitter(auxiliary(seed), config) for seed, name in enumerate(("ada", "bob"))})


def same(one: object, other: object) -> bool:
    """Whether two states are equal to the last bit; a tuple is as good as a list."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


def test_batches_are_taken_in_order_and_once() -> None:
    ours, byhand = fits(), make_fitter(auxiliary(0), CONFIGS["adamw"])
    first = ours.take("ada", 0, pairs(0))
    assert (first.number, first.steps, first.tensors, first.refused) == (0, 0, None, None)
    with pytest.raises(GradientLearningError, match="batch 2 of ada came, but batch 1 is the next"):
        ours.take("ada", 2, pairs(2))
    second = ours.take("ada", 1, pairs(1))
    for seed in (0, 1):
        byhand.collect(pairs(seed))
    assert second.steps == 1 and second.tensors is not None
    assert same(second.tensors, {name: tensor.detach() for name, tensor in byhand.auxiliary.tensors.items()})
    # The answer was lost, and the batch comes again, whatever is in it now.
    before = ours.state_dict("ada")
    again = ours.take("ada", 1, pairs(7))
    assert (again.number, again.steps) == (1, 1) and same(again.tensors, second.tensors)
    assert ours.take("ada", 0, pairs(0)).number == 1
    assert same(ours.state_dict("ada"), before)
    # What is handed out is the caller's own.
    second.tensors["one.lora_B.weight"].fill_(9.0)
    assert same(ours.state_dict("ada"), before)
    # Bob has a count of his own.
    assert ours.state_dict("bob")["next"] == 0
    assert ours.customers == ["ada", "bob"]
    with pytest.raises(GradientLearningError, match="customer 'eve' is not fitted here; ada, bob are"):
        ours.take("eve", 0, pairs(0))


@pytest.mark.parametrize("config", CONFIGS)
def test_customers_fits_are_fitters_called_by_hand(config: str) -> None:
    ours, byhand = fits(CONFIGS[config]), make_fitter(auxiliary(0), CONFIGS[config])
    for number in range(7):
        ours.take("ada", number, pairs(number), flush=number == 4)
        ours.take("bob", number, pairs(number + 50))
        byhand.collect(pairs(number))
        if number == 4:
            byhand.flush()
    assert same(ours.state_dict("ada")["fitter"], byhand.state_dict())


def test_a_batch_without_rows_counts_and_changes_nothing() -> None:
    ours = fits()
    ours.take("ada", 0, pairs(0))
    before = ours.state_dict("ada")["fitter"]
    taken = ours.take("ada", 1, None)
    assert (taken.number, taken.steps, taken.tensors) == (1, 0, None)
    assert same(ours.state_dict("ada")["fitter"], before)
    # It does not fill an interval, and its flush fits what is there.
    flushed = ours.take("ada", 2, None, flush=True)
    assert flushed.steps == 1 and flushed.tensors is not None
    nothing = ours.take("ada", 3, None, flush=True)
    assert nothing.steps == 1 and nothing.tensors is None
    # A batch that fills the interval is fitted once, flush or not.
    ours.take("ada", 4, pairs(1))
    assert ours.take("ada", 5, pairs(2), flush=True).steps == 2


@pytest.mark.parametrize("what", ["x", "g", "product"])
def test_a_refused_batch_leaves_all_as_it_was(what: str) -> None:
    ours = fits()
    ours.take("ada", 0, pairs(0))
    before, bad = ours.state_dict("ada"), pairs(1)
    if what == "product":
        bad = {name: Pair(pair.x * 1e30, pair.g * 1e30) for name, pair in bad.items()}
    else:
        getattr(bad["two"], what)[2, 1] = float("nan")
    with pytest.raises(NotFiniteError):
        ours.take("ada", 1, bad, flush=True)
    with pytest.raises(GradientLearningError, match="no pair came for site two"):
        ours.take("ada", 1, {"one": bad["one"]})
    assert same(ours.state_dict("ada"), before)
    # The number goes to another batch, or to none.
    other = copy.deepcopy(ours)
    assert ours.take("ada", 1, pairs(1)).steps == 1
    assert other.take("ada", 1, None).number == 1 and other.take("ada", 2, pairs(1)).steps == 1
    assert same(ours.state_dict("ada")["fitter"], other.state_dict("ada")["fitter"])


def through_a_file(state: object, path: Path) -> object:
    tensors, text = pack_state(state)
    save_file(tensors, path, metadata={"state": text})
    with safe_open(path, framework="pt") as file:
        return unpack_state({name: file.get_tensor(name) for name in file.keys()}, file.metadata()["state"])  # noqa: SIM118


@pytest.mark.parametrize("config", CONFIGS)
def test_states_go_through_a_file_to_the_last_bit(config: str, tmp_path: Path) -> None:
    straight, first = fits(CONFIGS[config]), fits(CONFIGS[config])
    for number in range(9):
        straight.take("ada", number, pairs(number))
    for number in range(5):
        first.take("ada", number, pairs(number))
    state = first.state_dict("ada")
    read = through_a_file(state, tmp_path / "state.safetensors")
    assert same(read, state)
    second = fits(CONFIGS[config])
    second.take("ada", 0, pairs(40))
    second.load_state_dict("ada", read)  # type: ignore[arg-type]
    with pytest.raises(GradientLearningError, match="batch 5 is the next"):
        second.take("ada", 6, pairs(6))
    assert second.take("ada", 4, pairs(4)).number == 4
    for number in range(5, 9):
        second.take("ada", number, pairs(number))
    assert same(second.state_dict("ada"), straight.state_dict("ada"))
    assert straight.state_dict("ada")["fitter"]["steps"] == 9 // CONFIGS[config].interval


def test_a_state_of_another_auxiliary_changes_nothing() -> None:
    ours, other = fits(), Fits({"ada": make_fitter(Auxiliary(SITES, AuxiliaryConfig(rank=3)), CONFIGS["adamw"])})
    ours.take("ada", 0, pairs(0))
    before = ours.state_dict("ada")
    with pytest.raises(GradientLearningError, match="rank"):
        ours.load_state_dict("ada", other.state_dict("ada"))
    assert same(ours.state_dict("ada"), before)


def test_states_hold_plain_values_and_tensors_alone() -> None:
    state = {"a": [1, 2.5, None, True, "x", (torch.arange(3), {})], 7: {"b": torch.ones(2, dtype=torch.bfloat16)}}
    tensors, text = pack_state(state)
    assert sorted(tensors) == ["0", "1"] and json.loads(text)
    back = unpack_state(tensors, text)
    assert same(back, state) and [*back] == ["a", 7]
    with pytest.raises(GradientLearningError, match="a state holds a set"):
        pack_state({"a": {1}})
    with pytest.raises(GradientLearningError, match="a state holds a function"):
        pack_state([same])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"tensor": "9"}',
        '{"tensor": ["0"]}',
        '{"items": [[1]]}',
        '{"items": 3}',
        '{"other": []}',
        '{"items": [[{"tensor": "0"}, 1]], "tensor": "0"}',
        '{"items": [[[1], 2]]}',
        '{"items": [[{"tensor": "0"}, 2]]}',
        "[" * 100_000,
    ],
    ids=range(10),
)
def test_what_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(GradientLearningError, match="no state that was packed here"):
        unpack_state({"0": torch.zeros(1)}, text)


def test_rates_rise_fall_and_stay_above_zero() -> None:
    def rates(config: FitConfig, count: int) -> list[float]:
        fitter: Fitter = make_fitter(auxiliary(), config)
        seen = []
        for number in range(count):
            seen.append(fitter.optimizer.param_groups[0]["lr"])
            fitter.collect(pairs(number))
        return seen

    linear = rates(FitConfig(lr=1.0, schedule="linear", warmup_fits=2, fits=6), 8)
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.25, 0.25])
    cosine = rates(FitConfig(lr=1.0, schedule="cosine", fits=2), 4)
    assert cosine == pytest.approx([1.0, 0.5, 0.5, 0.5])
    assert rates(FitConfig(lr=1.0, warmup_fits=4), 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert rates(FitConfig(lr=0.3), 2) == [0.3, 0.3]
