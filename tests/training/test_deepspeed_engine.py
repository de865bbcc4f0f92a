"""ZeRO 0 to 3 on real workers: against plain PyTorch on the whole batch, and from any stage and world to any other."""

from __future__ import annotations

import math

import pytest
import torch

from ot_ray.errors import MissingDependencyError
from ot_ray.training import DeepSpeedEngine, TorchEngine
from tests.training.engine_groups import PAIR, PAIR_MOVES, SINGLE_MOVES, TRIPLE_MOVES, run_pair, run_single, run_triple
from tests.training.engines import (
    MODULES,
    SAVED_AT,
    STEPS,
    Saved,
    engine_config,
    net,
    plain,
    run,
    save_pieces,
)
from tests.training.samples import PATIENCE, run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

# Workers and their shards add the same float32 numbers in another order than one process does.
ROUNDING = 1e-5
# bfloat16 keeps 8 bits; a loss is a mean over many values, whose roundings mostly cancel.
COARSE = 1e-2

FLOAT32 = [case for case in PAIR if case.precision == "float32"]
BFLOAT16 = [case for case in PAIR if case.precision == "bfloat16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def alone(folder):
    """The same runs in one process: by hand where the formulas are in the tests, else by the plain engine."""
    results = {}
    for name in MODULES:
        config = engine_config()
        engine = TorchEngine(MODULES[name](), config, device="cpu")
        history = run(engine, config, range(SAVED_AT))
        if name == "net":
            save_pieces(engine, folder / "torch")
        history += run(engine, config, range(SAVED_AT, STEPS))
        results[name] = (history, engine.trainable_state()) if name.startswith("distill") else plain(name, config)
    return results


@pytest.fixture(scope="module")
def pair(folder, alone):
    run_group(run_pair, 2, folder)
    return [torch.load(folder / f"pair-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def triple(folder, pair):
    run_group(run_triple, 3, folder)
    return [torch.load(folder / f"triple-{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.fixture(scope="module")
def single(folder, pair):
    run_group(run_single, 1, folder)
    return torch.load(folder / "single-0.pt", weights_only=False)


def _figures(history, name="loss"):
    return [figures[name] for figures in history]


def _same_run(history, expected, first=0):
    for name in ("loss", "grad_norm"):
        assert _figures(history, name) == pytest.approx(_figures(expected[first:], name), rel=ROUNDING)


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32_is_plain_pytorch_on_the_whole_batch(case, pair, alone):
    seen, (history, weights) = pair[0]["cases"][case], alone[case.module]
    _same_run(seen["history"], history)
    assert seen["weights"].keys() == weights.keys()
    for name, tensor in weights.items():
        assert seen["weights"][name].dtype == torch.float32
        # AdamW divides by the gradient's own size, which lifts the roundings of small gradients.
        torch.testing.assert_close(seen["weights"][name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_stays_close_to_float32(case, pair, alone):
    history, exact = pair[0]["cases"][case]["history"], alone[case.module][0]
    assert _figures(history) == pytest.approx(_figures(exact), rel=COARSE)
    assert _figures(history, "grad_norm") == pytest.approx(_figures(exact, "grad_norm"), rel=5 * COARSE)
    assert _figures(history)[0] != _figures(exact)[0], "bfloat16 was not used"


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_leaves_float32_masters_and_buffers(case, pair):
    seen = pair[0]["cases"][case]
    # Rounded to bfloat16, rotary frequencies would turn far positions by a radian.
    assert seen["float32 buffers"] == {"torch.float32"}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in seen["weights"].values())


@pytest.mark.parametrize("case", PAIR, ids=str)
def test_all_ranks_report_the_same_and_rank_0_holds_the_weights(case, pair):
    first, second = (rank["cases"][case] for rank in pair)
    assert first["history"] == second["history"]
    assert first["weights"] and second["weights"] == {}


@pytest.mark.parametrize("case", PAIR, ids=str)
def test_frozen_parameters_get_no_gradient(case, pair):
    assert all(rank["cases"][case]["frozen gradients"] == [] for rank in pair)
    learning = {name for name, p in MODULES[case.module]().named_parameters() if p.requires_grad}
    assert pair[0]["cases"][case]["weights"].keys() == learning


@pytest.mark.parametrize("stage", range(4))
def test_frozen_parameters_get_no_float32_copy_and_no_state(stage, pair):
    for rank in pair:
        growth, learning, frozen = rank["float32 bytes"][stage]
        # Masters and two moments, and what AdamW needs for a moment; a copy of the frozen part is far above.
        assert 0 < growth <= 4 * 6 * learning < 4 * frozen


@pytest.mark.parametrize("case", PAIR, ids=str)
def test_a_restored_engine_goes_on_bit_for_bit(case, pair):
    for rank in pair:
        seen = rank["cases"][case]
        assert seen["resumed"] == seen["history"][SAVED_AT:]
        assert seen["copies follow"]


@pytest.mark.parametrize("move", PAIR_MOVES, ids=str)
def test_two_ranks_take_up_any_run(move, pair, alone):
    _same_run(pair[0]["moves"][move], alone["net"][0], SAVED_AT)


@pytest.mark.parametrize("move", TRIPLE_MOVES, ids=str)
def test_three_ranks_take_up_a_run_of_two(move, triple, alone):
    _same_run(triple[0]["moves"][move], alone["net"][0], SAVED_AT)


@pytest.mark.parametrize("move", SINGLE_MOVES, ids=str)
def test_one_rank_takes_up_a_run_of_two(move, single, alone):
    _same_run(single["moves"][move], alone["net"][0], SAVED_AT)


@pytest.mark.parametrize("stage", range(4))
def test_plain_pytorch_takes_up_a_run_of_two(stage, folder, pair, alone):
    config = engine_config()
    engine = TorchEngine(net(), config, device="cpu")
    engine.restore(SAVED_AT, Saved(folder / f"net-float32-{stage}", engine.sizes()).read)
    _same_run(run(engine, config, range(SAVED_AT, STEPS)), alone["net"][0], SAVED_AT)


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("stage", range(4))
def test_four_rows_on_three_ranks_are_four_rows_on_one(stage, micro, triple, alone):
    for rank in triple:
        _same_run(rank["uneven"][stage, micro], alone["net"][0])


@pytest.mark.parametrize("stage", range(4))
def test_a_module_without_values_is_filled(stage, pair, alone):
    for rank in pair:
        _same_run(rank["filled"]["float32", stage]["history"], alone["net"][0])


def test_zero_3_asks_each_rank_for_its_own_part_alone(pair):
    sizes = {name: p.numel() for name, p in net().named_parameters()}
    asked = [rank["filled"]["float32", 3]["asked"] for rank in pair]
    for name, size in sizes.items():
        ranges = sorted(
            (start, end) for requests in asked for other, start, end in requests if other == name and end > start
        )
        assert ranges == [(0, (size + 1) // 2), ((size + 1) // 2, size)] if size > 1 else ranges == [(0, 1)]
    # What is no parameter is small, and every rank has it whole; frequencies that no checkpoint stores are not asked.
    assert {name for requests in asked for name, *_ in requests} == sizes.keys() | {"shift"}


@pytest.mark.parametrize(("precision", "stage"), [("float32", 2), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3)])
def test_masters_start_from_the_stored_values(precision, stage, pair):
    stored = {name: tensor.flatten() for name, tensor in net().state_dict().items()}
    for rank in pair:
        masters = {k: tensor for k, tensor in rank["filled"][precision, stage]["start"].items() if k[0] == "weight"}
        assert masters
        for (_, name, start), tensor in masters.items():
            assert torch.equal(tensor, stored[name][start : start + tensor.numel()])


@pytest.mark.parametrize(("what", "stage"), [("loss", 2), ("gradient", 0), ("gradient", 3)])
def test_what_is_not_finite_on_one_rank_shows_on_all(what, stage, pair):
    name = "loss" if what == "loss" else "grad_norm"
    for number, rank in enumerate(pair):
        seen = rank["poisoned"][what, stage]
        values = _figures(seen["history"], name)
        assert all(map(math.isfinite, values[:2])) and math.isnan(values[2])
        assert math.isnan(seen["local_loss"]) == (what == "loss" and number == 1), "only its own rank is to blame"


def test_ranks_exchange_values(pair):
    everyone = [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü" * 100}]
    assert [rank["gathered"] for rank in pair] == [[everyone, {"a": 2.5, "b": 1.0}]] * 2


def test_what_cannot_be_run_is_refused(pair):
    for number, rank in enumerate(pair):
        assert rank["few rows"].startswith("ConfigError: batch_size is 1")
        assert f"rank {number} of 2 was given 1 rows; training.batch_size 4 makes 2" in rank["wrong rows"]
        assert "TrainingError: 14 tensors are on the meta device" in rank["no fill"]
        assert rank["no fill"].endswith("pass `fill`")


def test_without_deepspeed_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ot_ray\[platform\]'"):
        DeepSpeedEngine(net(), engine_config())
