"""The loop of gradient learning against loops written out by hand, and runs that stop against runs that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    BasePass,
    Collaboration,
    CustomerRows,
    FitConfig,
    Fits,
    Joint,
    Merging,
    Mode,
    Pair,
    find_sites,
    make_fitter,
)
from ot_ray.data import PackedSequence
from ot_ray.errors import ConfigError, DataError, GradientLearningError, MergeError, TrainingError
from ot_ray.store import open_store
from ot_ray.training import (
    CustomerBatches,
    FittingHere,
    GradientCheckpoints,
    GradientRun,
    TrainingResult,
    learn,
)
from tests.fixtures.models import VOCAB, tiny_model

PATTERNS = {"opt": ["*.q_proj", "*.fc1"], "gpt2": ["*.c_attn", "*.c_fc"]}
CUSTOMERS = ("ann", "bob")


def rows(number: int, customers: Sequence[str] = CUSTOMERS, length: int = 9, each: int = 2) -> CustomerRows:
    """Rows of a batch; a customer's are the same whoever else is there."""
    parts = []
    for name in customers:
        generator = torch.Generator().manual_seed(1000 * number + sum(name.encode()))
        parts.append(torch.randint(2, VOCAB, (each, length), generator=generator))
    ids = torch.cat(parts)
    return CustomerRows(ids, tuple(name for name in customers for _ in range(each)), ids.clone())


def base_pass(family: str = "opt", seed: int = 0) -> BasePass:
    model = tiny_model(family, depth=2, seed=seed)
    return BasePass(model, find_sites(model, PATTERNS[family]))


def auxiliaries(base: BasePass, **kinds: Mapping[str, Any]) -> dict[str, Auxiliary]:
    return {name: Auxiliary(base.sites, AuxiliaryConfig(**given)) for name, given in kinds.items()}


def fitting_of(given: Mapping[str, Auxiliary], **config: Any) -> FittingHere:
    return FittingHere(Fits({name: make_fitter(one.copy(), FitConfig(**config)) for name, one in given.items()}))


def tensors_of(mode: Mode) -> dict[str, dict[str, Tensor]]:
    return {
        name: {part: tensor.clone() for part, tensor in auxiliary.tensors.items()}
        for name, auxiliary in mode.auxiliaries.items()
    }


def assert_same(
    one: Mapping[str, Mapping[str, Tensor]],
    other: Mapping[str, Mapping[str, Tensor]],
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    assert one.keys() == other.keys()
    for owner in one:
        assert one[owner].keys() == other[owner].keys()
        for name in one[owner]:
            torch.testing.assert_close(one[owner][name], other[owner][name], rtol=rtol, atol=atol)


TWO_KINDS = {"ann": {"rank": 3, "alpha": 6.0, "seed": 1}, "bob": {"kind": "mlp", "rank": 2, "seed": 2}}
TWO_LORAS = {"ann": {"rank": 3, "alpha": 6.0, "seed": 1}, "bob": {"rank": 5, "alpha": 5.0, "seed": 2}}


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_staleness_0_is_lora_by_back_propagation_step_for_step(family: str) -> None:
    base = base_pass(family)
    given = auxiliaries(base, **TWO_LORAS)
    expected = {name: _peft_run(family, name, given[name], 6) for name in CUSTOMERS}
    mode = Alone(given)

    result = learn(base, mode, _Numbered(), fitting_of(given, lr=0.01), GradientRun(steps=6))

    for name in CUSTOMERS:
        losses, tensors = expected[name]
        found = [figures[f"loss/{name}"] for figures in result.history]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=2e-5, atol=0)
        start = Auxiliary(base.sites, AuxiliaryConfig(**TWO_LORAS[name])).tensors
        for part, tensor in mode.auxiliaries[name].tensors.items():
            # AdamW's steps are of one size, however small a gradient is; their rounding is what is allowed.
            torch.testing.assert_close(tensor, tensors[part], rtol=0, atol=2e-4)
            assert (tensor - start[part]).abs().max() > 0.01
    assert result.history[-1]["loss"] == pytest.approx(sum(expected[name][0][-1] for name in CUSTOMERS) / 2, rel=2e-5)
    assert result.history[-1]["fits"] == 12
    assert [figures["step"] for figures in result.history] == [1, 2, 3, 4, 5, 6]


class _Numbered:
    """The rows of every batch; which were asked for is kept."""

    def __init__(self, customers: Sequence[str] = CUSTOMERS) -> None:
        self.customers, self.asked = customers, []

    def __getitem__(self, number: int) -> CustomerRows:
        self.asked.append(number)
        return rows(number, self.customers)


def _peft_run(family: str, name: str, start: Auxiliary, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """One customer's LoRA by PEFT, torch's own loss and AdamW."""
    model = tiny_model(family, depth=2).requires_grad_(False)
    config = LoraConfig(
        r=start.config.rank,
        lora_alpha=int(start.config.alpha),
        target_modules=list(start.sites),
        fan_in_fan_out=family == "gpt2",
    )
    tuned = get_peft_model(model, config).eval()
    parts = {
        parameter_name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for parameter_name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    }
    assert parts.keys() == start.tensors.keys()
    with torch.no_grad():
        for part, parameter in parts.items():
            parameter.copy_(start.tensors[part])
    optimizer = torch.optim.AdamW(parts.values(), lr=0.01, weight_decay=0.0)
    losses = []
    for number in range(steps):
        ids = rows(number, [name]).input_ids
        logits = tuned(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {part: parameter.detach() for part, parameter in parts.items()}


def _delayed(base: BasePass, mode: Mode, steps: int, staleness: int, barriers: Sequence[int], **config: Any):
    """The loop written out: pass n sees the fits up to n - 1 - staleness, or all after a barrier."""
    fitters = {name: make_fitter(one.copy(), FitConfig(**config)) for name, one in mode.auxiliaries.items()}
    snapshots: list[dict[str, dict[str, Tensor]]] = []

    def now() -> dict[str, dict[str, Tensor]]:
        return {
            name: {part: tensor.detach().clone() for part, tensor in fitter.auxiliary.tensors.items()}
            for name, fitter in fitters.items()
        }

    start, floor, losses = now(), 0, []
    for number in range(steps):
        seen = max(number - staleness, floor)
        for name, tensors in (snapshots[seen - 1] if seen else start).items():
            mode.auxiliaries[name].load(tensors)
        passed = base(rows(number), mode)
        losses.append(passed.losses)
        for name, fitter in fitters.items():
            fitter.collect(passed.pairs[name])
            if number + 1 == steps:
                fitter.flush()
        snapshots.append(now())
        if number + 1 in barriers:
            floor = number + 1
    return losses, snapshots[-1]


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_pass_sees_exactly_the_fits_that_staleness_allows(staleness: int, interval: int) -> None:
    base = base_pass()
    given = auxiliaries(base, **TWO_KINDS)
    losses, expected = _delayed(
        base, Alone({name: one.copy() for name, one in given.items()}), 7, staleness, (4,), lr=0.02, interval=interval
    )
    mode = Alone(given)

    result = learn(
        base,
        mode,
        _Numbered(),
        fitting_of(given, lr=0.02, interval=interval),
        GradientRun(steps=7, staleness=staleness, evaluate_every=4),
        evaluate=lambda: {"seen": 1.0},
    )

    assert [{name: figures[f"loss/{name}"] for name in CUSTOMERS} for figures in result.history] == losses
    assert_same(tensors_of(mode), expected)
    assert [entry["step"] for entry in result.evaluations] == [0, 4, 7]


def test_staleness_is_felt() -> None:
    exact, stale = (_outcome(GradientRun(steps=5, staleness=staleness))[1] for staleness in (0, 2))
    assert not torch.equal(*(next(iter(tensors["ann"].values())) for tensors in (exact, stale)))


def _outcome(
    run: GradientRun, checkpoints: GradientCheckpoints | None = None, batches: Any = None, interval: int = 2
) -> tuple[TrainingResult, dict[str, dict[str, Tensor]]]:
    base = base_pass()
    given = auxiliaries(base, **TWO_KINDS)
    mode = Alone(given)
    fitting = fitting_of(given, lr=0.02, interval=interval, schedule="cosine", fits=4)
    result = learn(
        base,
        mode,
        batches or _Numbered(),
        fitting,
        run,
        checkpoints=checkpoints,
        evaluate=lambda: {"sum": sum(float(tensor.sum()) for tensor in mode.auxiliaries["ann"].tensors.values())},
    )
    return result, tensors_of(mode)


def test_what_an_interval_has_left_is_fitted_at_the_end_and_where_it_is_asked_for() -> None:
    result, _ = _outcome(GradientRun(steps=5), interval=2)
    assert [figures["fits"] for figures in result.history] == [0, 2, 2, 4, 6]
    result, _ = _outcome(GradientRun(steps=5, flush_every=3), interval=2)
    assert [figures["fits"] for figures in result.history] == [0, 2, 4, 4, 6]


@pytest.mark.parametrize("mode", ["joint", "collaboration"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_merged_passes_are_those_that_are_not_merged(mode: str, staleness: int) -> None:
    found = {}
    for merged in (False, True):
        base = base_pass("gpt2", seed=3)
        weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
        kinds: Any = {"joint": {"rank": 3}} if mode == "joint" else {"ann": {"rank": 3}, "bob": {"kind": "linear"}}
        given = auxiliaries(base, **kinds)
        made = Joint(given["joint"]) if mode == "joint" else Collaboration(given)
        run = GradientRun(steps=5, merged=merged, staleness=staleness)
        result = learn(base, made, _Numbered(), fitting_of(given, optimizer="sgd", lr=0.05), run)
        found[merged] = [figures["loss"] for figures in result.history], tensors_of(made)
        for name, tensor in base.model.state_dict().items():
            assert torch.equal(tensor, weights[name]), f"{name} is not clean again"
    torch.testing.assert_close(torch.tensor(found[True][0]), torch.tensor(found[False][0]), rtol=1e-5, atol=0)
    assert_same(found[True][1], found[False][1], rtol=1e-3, atol=1e-5)
    assert found[True][0][0] - found[True][0][-1] != 0


def test_merging_that_is_handed_over_stays_merged() -> None:
    base = base_pass()
    given = auxiliaries(base, joint={"rank": 2})
    mode = Joint(given["joint"])
    with Merging(base.model, base.sites) as merging:
        learn(base, mode, _Numbered(), fitting_of(given, lr=0.05), GradientRun(steps=2, merged=True), merging=merging)
        merged, _ = base.losses(rows(9), mode, merged=True)
    beside, _ = base.losses(rows(9), mode)
    assert merged == pytest.approx(beside, rel=1e-5)
    plain, _ = base.losses(rows(9), mode, merged=True)
    assert abs(plain["ann"] - beside["ann"]) > 1e-3


def test_merging_where_rows_need_weights_of_their_own_is_refused() -> None:
    base = base_pass()
    given = auxiliaries(base, **TWO_LORAS)
    with pytest.raises(MergeError, match="need weights of their own"):
        learn(base, Alone(given), _Numbered(), fitting_of(given), GradientRun(steps=1, merged=True))
    with Merging(base.model, base.sites) as merging, pytest.raises(MergeError, match="merged"):
        learn(base, Alone(given), _Numbered(), fitting_of(given), GradientRun(steps=1), merging=merging)


class _Dies(_Numbered):
    """Rows until a run is killed."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def __getitem__(self, number: int) -> CustomerRows:
        if number == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(number)


def _checkpoints(folder: Path, steps: int = 7, keep: int = 2) -> GradientCheckpoints:
    return GradientCheckpoints(open_store(str(folder)), "run", {"steps": steps}, keep=keep)


def _without_times(entries: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    times = {"seconds", "tokens_per_s", "fit_wait", "fit_wait_share"}
    return [{name: value for name, value in entry.items() if name not in times} for entry in entries]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_end(staleness: int, tmp_path: Path) -> None:
    # Some checkpoints are in the middle of an interval.
    run = GradientRun(steps=7, staleness=staleness, checkpoint_every=3, evaluate_every=2)
    whole, tensors = _outcome(run, _checkpoints(tmp_path / "whole"))
    for at in range(1, 7):
        folder = tmp_path / f"stopped-{at}"
        with pytest.raises(KeyboardInterrupt):
            _outcome(run, _checkpoints(folder), _Dies(at))
        batches = _Numbered()
        again, found = _outcome(run, _checkpoints(folder), batches)
        assert batches.asked == list(range(at // 3 * 3, 7))
        assert_same(found, tensors)
        assert _without_times(again.history) == _without_times(whole.history)
        assert again.evaluations == whole.evaluations


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    run = GradientRun(steps=4)
    whole, tensors = _outcome(run, _checkpoints(tmp_path))
    batches = _Numbered()
    again, found = _outcome(run, _checkpoints(tmp_path), batches)
    assert batches.asked == []
    assert_same(found, tensors)
    assert again == whole


def test_old_states_go_and_figures_stay(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    whole, _ = _outcome(GradientRun(steps=7, checkpoint_every=1), checkpoints)
    assert checkpoints.committed() == [6, 7]
    states = [path.relative_to(tmp_path / "run").parts[0] for path in tmp_path.rglob("*.safetensors")]
    assert sorted(states) == ["step-00000006", "step-00000007"]
    resumed = _checkpoints(tmp_path).resume()
    assert resumed is not None
    assert resumed.history == whole.history
    assert resumed.evaluations == whole.evaluations


def test_what_was_never_committed_counts_for_nothing(tmp_path: Path) -> None:
    run = GradientRun(steps=7, checkpoint_every=2)
    whole, tensors = _outcome(run, _checkpoints(tmp_path, keep=9))
    (tmp_path / "run" / "step-00000007" / "commit.json").unlink()
    (tmp_path / "run" / "step-00000006" / "commit.json").unlink()
    batches = _Numbered()
    again, found = _outcome(run, _checkpoints(tmp_path), batches)
    assert batches.asked == [4, 5, 6]
    assert_same(found, tensors)
    assert _without_times(again.history) == _without_times(whole.history)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    _outcome(GradientRun(steps=4), _checkpoints(tmp_path))
    with pytest.raises(TrainingError, match="belongs to another run: steps changed"):
        _outcome(GradientRun(steps=4), _checkpoints(tmp_path, steps=8))
    state = next(tmp_path.rglob("*.safetensors"))
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(TrainingError, match=r"step-00000004.*delete .*commit\.json"):
        _outcome(GradientRun(steps=4), _checkpoints(tmp_path))


class _Poisoned(FittingHere):
    """One customer's gradients are NaN in one batch."""

    def submit(self, number: int, pairs: Mapping[str, Mapping[str, Pair] | None], flush: bool = False) -> None:
        if number == 2:
            assert pairs["bob"] is not None
            pairs = {**pairs, "bob": {site: Pair(pair.x, pair.g * torch.nan) for site, pair in pairs["bob"].items()}}
        super().submit(number, pairs, flush)


def test_a_batch_that_is_not_finite_is_left_out_and_the_run_goes_on() -> None:
    found = {}
    for kind in (FittingHere, _Poisoned):
        base = base_pass()
        given = auxiliaries(base, **TWO_LORAS)
        mode = Alone(given)
        fits = Fits({name: make_fitter(one.copy(), FitConfig(lr=0.02)) for name, one in given.items()})
        result = learn(base, mode, _Numbered(), kind(fits), GradientRun(steps=4))
        found[kind] = result.history, tensors_of(mode)
    history, tensors = found[_Poisoned]
    assert [figures["refused"] for figures in history] == [0, 0, 1, 1]
    assert [figures["fits"] for figures in history] == [2, 4, 5, 7]
    assert_same({"ann": tensors["ann"]}, {"ann": found[FittingHere][1]["ann"]})
    assert all(tensor.isfinite().all() for tensor in tensors["bob"].values())


def test_an_auxiliary_that_becomes_infinite_is_said_to_be() -> None:
    base = base_pass()
    given = auxiliaries(base, **TWO_LORAS)
    fitting = fitting_of(given, optimizer="sgd", lr=1e30, weight_decay=1e30)
    with pytest.raises(TrainingError, match=r"auxiliary of ann became infinite at fit 1"):
        learn(base, Alone(given), _Numbered(), fitting, GradientRun(steps=9))


def test_a_customer_without_rows_in_a_batch_skips_it() -> None:
    base = base_pass()
    given = auxiliaries(base, **TWO_LORAS)
    mode = Alone(given)
    batches = [rows(0), rows(1, ["ann"]), rows(2)]
    result = learn(base, mode, batches, fitting_of(given, lr=0.02), GradientRun(steps=3))
    assert "loss/bob" not in result.history[1]
    assert [figures["fits"] for figures in result.history] == [2, 3, 5]


def test_fits_that_are_not_the_modes_or_not_new_are_refused() -> None:
    base = base_pass()
    given = auxiliaries(base, **TWO_LORAS)
    with pytest.raises(GradientLearningError, match="fits are of ann, the mode's auxiliaries of ann, bob"):
        learn(base, Alone(given), _Numbered(), fitting_of({"ann": given["ann"]}), GradientRun(steps=1))
    fitting = fitting_of(given)
    learn(base, Alone(given), _Numbered(), fitting, GradientRun(steps=1))
    with pytest.raises(GradientLearningError, match="taken 1 batches, this run 0"):
        learn(base, Alone(given), _Numbered(), fitting, GradientRun(steps=1))
    with pytest.raises(GradientLearningError, match="not submitted"):
        fitting.taken(7)


def test_figures_say_how_long_a_pass_waited_for_fits() -> None:
    result, _ = _outcome(GradientRun(steps=2))
    for figures in result.history:
        assert 0 <= figures["fit_wait"] <= figures["seconds"]
        assert figures["fit_wait_share"] == figures["fit_wait"] / figures["seconds"]
        assert figures["tokens_per_s"] == pytest.approx(36 / figures["seconds"])


def _sequences(count: int, seed: int, real: int = 6) -> list[PackedSequence]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(2, VOCAB, (8,), generator=generator)
        held = torch.arange(8) < real
        made.append(PackedSequence(ids, torch.arange(8), ids.where(held & (torch.arange(8) > 0), -100), held))
    return made


def test_batches_show_each_customer_every_sequence_of_its_own_once_an_epoch() -> None:
    sequences = {"ann": _sequences(4, 0), "bob": _sequences(6, 1, real=5)}
    batches = CustomerBatches(sequences, 2, seed=3)
    together = [batches[number] for number in range(6)]
    assert together[0].customers == ("ann", "ann", "bob", "bob")
    assert together[0].input_ids.shape == (4, 6)
    assert together[0].mask is not None
    assert together[0].mask.sum(1).tolist() == [6, 6, 5, 5]
    for name, place, epoch in (("ann", 0, 2), ("bob", 2, 3)):
        for first in range(0, 6, epoch):
            shown = [
                row[: 6 if name == "ann" else 5].tolist()
                for batch in together[first : first + epoch]
                for row in batch.input_ids[place : place + 2]
            ]
            own = [one.input_ids[: 6 if name == "ann" else 5].tolist() for one in sequences[name]]
            assert sorted(shown) == sorted(own)
    alone = CustomerBatches({"bob": sequences["bob"]}, 2, seed=3)
    for number in range(6):
        assert torch.equal(alone[number].input_ids, together[number].input_ids[2:, :5])
    assert torch.equal(batches[2].input_ids, together[2].input_ids)


def test_batches_of_nobody_or_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="customer bob has no sequences"):
        CustomerBatches({"ann": _sequences(1, 0), "bob": []}, 1, 0)
    with pytest.raises(DataError, match="no customers"):
        CustomerBatches({}, 1, 0)
    with pytest.raises(ConfigError, match="rows is 0"):
        CustomerBatches({"ann": _sequences(1, 0)}, 0, 0)


def test_k_customers_in_one_pass_are_k_runs() -> None:
    base = base_pass()
    given = auxiliaries(base, **TWO_KINDS)
    mode = Alone({name: one.copy() for name, one in given.items()})
    learn(base, mode, _Numbered(), fitting_of(given, optimizer="sgd", lr=0.05), GradientRun(steps=5))
    for name in CUSTOMERS:
        one = {name: given[name]}
        own = Alone({name: given[name].copy()})
        learn(base, own, _Numbered([name]), fitting_of(one, optimizer="sgd", lr=0.05), GradientRun(steps=5))
        assert_same(tensors_of(own), {name: tensors_of(mode)[name]}, rtol=1e-4, atol=1e-6)
