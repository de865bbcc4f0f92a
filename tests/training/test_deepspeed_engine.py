"""ZeRO 0 to 3 on two real workers: against plain PyTorch on the whole batch, and against each other."""

from __future__ import annotations

import re

import pytest
import torch

from ot_ray.errors import TrainingError
from ot_ray.store import open_store
from ot_ray.training import Checkpoints, TorchEngine, train
from ot_ray.training.engine import accumulation_steps
from tests.training.samples import Dropped, stream, training
from tests.training.workers import CASES, MODULES, case_config, resume_config

pytestmark = pytest.mark.slow

# Two workers and their shards add the same float32 numbers in another order than one process does.
ROUNDING = 2e-6
# bfloat16 keeps 8 bits; a loss is a mean over many values, whose roundings mostly cancel.
COARSE = 1e-2

FLOAT32 = [case for case in CASES if case[1] == "float32"]
BFLOAT16 = [case for case in CASES if case[1] == "bfloat16"]


def _figures(case, name):
    return [figures[name] for figures in case["history"]]


@pytest.fixture(scope="module")
def alone():
    """The same runs in one process by plain PyTorch, in float32."""
    results = {}
    for name, make in MODULES.items():
        config = case_config("float32", 0)
        engine = TorchEngine(make(), config, device="cpu")
        results[name] = {"history": train(engine, stream(config), config).history, "weights": engine.trainable_state()}
    return results


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32_is_plain_pytorch_on_the_whole_batch(case, group, alone):
    sharded, whole = group[0]["cases"][case], alone[case[0]]
    for name in ("loss", "lr", "grad_norm"):
        assert _figures(sharded, name) == pytest.approx(_figures(whole, name), rel=10 * ROUNDING)
    assert sharded["weights"].keys() == whole["weights"].keys()
    for name, tensor in whole["weights"].items():
        assert sharded["weights"][name].dtype == torch.float32
        # AdamW divides by the gradient's own size, which lifts the roundings of small gradients.
        torch.testing.assert_close(sharded["weights"][name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_stays_close_to_float32(case, group, alone):
    rounded, exact = group[0]["cases"][case], alone[case[0]]
    assert _figures(rounded, "loss") == pytest.approx(_figures(exact, "loss"), rel=COARSE)
    assert _figures(rounded, "grad_norm") == pytest.approx(_figures(exact, "grad_norm"), rel=5 * COARSE)
    assert _figures(rounded, "loss")[0] != _figures(exact, "loss")[0], "bfloat16 was not used"


def test_bfloat16_without_sharding_is_bfloat16_with(group):
    # DeepSpeed serves the two by different optimisers.
    replicated, sharded = (group[0]["cases"]["language", "bfloat16", stage] for stage in (0, 1))
    assert _figures(replicated, "loss") == _figures(sharded, "loss")


@pytest.mark.parametrize("stage", range(4))
def test_bfloat16_leaves_float32_masters_and_rotary_frequencies(stage, group):
    case = group[0]["cases"]["language", "bfloat16", stage]
    # Rounded to bfloat16, rotary frequencies would turn far positions by a radian.
    assert case["rotary"] == {"torch.float32"}
    for tensor in case["weights"].values():
        assert tensor.dtype == torch.float32
    assert any(not torch.equal(t, t.bfloat16().float()) for t in case["weights"].values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_report_the_same_and_rank_0_holds_the_weights(case, group):
    first, second = (rank["cases"][case] for rank in group)
    for name in ("loss", "lr", "grad_norm", "step"):
        assert _figures(first, name) == _figures(second, name)
    assert first["weights"] and second["weights"] == {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_parameters_get_no_gradient(case, group):
    assert all(rank["cases"][case]["frozen gradients"] == [] for rank in group)
    learning = {name for name, p in MODULES[case[0]]().named_parameters() if p.requires_grad}
    assert group[0]["cases"][case]["weights"].keys() == learning


@pytest.mark.parametrize("stage", range(4))
def test_a_run_that_stopped_resumes_bit_for_bit(stage, group):
    for rank in group:
        whole, resumed = rank["resumed"][stage]
        assert [figures["step"] for figures in resumed] == [5, 6, 7]
        for name in ("loss", "lr", "grad_norm"):
            assert [f[name] for f in resumed] == [f[name] for f in whole[4:]]


@pytest.mark.parametrize("stage", range(4))
def test_checkpoints_hold_what_learns_and_nothing_else(stage, group):
    folder = group[0]["folder"] / f"resume-{stage}/run/step-00000006"
    assert {path.suffix for path in folder.rglob("*.*")} == {".pt", ".json"}, "a checkpoint is data, without code"
    states = [torch.load(path, weights_only=False) for path in folder.rglob("*_states.pt")]
    learning = {name: p.numel() for name, p in Dropped().named_parameters() if p.requires_grad}
    assert all(state["module"].keys() == learning.keys() for state in states if "module" in state)
    kept = [tensor for state in states for tensor in _tensors(state) if tensor.dtype == torch.float32 and tensor.dim()]
    # A master copy and AdamW's two moments.
    assert sum(tensor.numel() for tensor in kept) == 3 * sum(learning.values())


def _tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


@pytest.mark.parametrize(
    ("what", "stage", "text"),
    [("loss", 2, "the loss became nan"), ("gradient", 0, "norm became nan"), ("gradient", 3, "norm became nan")],
)
def test_what_is_not_finite_on_one_rank_stops_all_and_spares_the_last_checkpoint(what, stage, text, group):
    for number, rank in enumerate(group):
        message = rank["poisoned"][what, stage]
        assert text in message and "at step 3" in message and f"rank {number}" in message
        assert "training.lr" in message
    store = open_store(str(group[0]["folder"] / f"{what}-{stage}"))
    assert Checkpoints(store, "run", {}).committed() == [1, 2]


def test_batches_that_do_not_divide_are_refused_before_any_step(group):
    for rank in group:
        assert re.search(r"batch_size is 3\b.* 2 workers .*multiple of 2$", rank["indivisible"])
        assert re.search(r"batch_size is 1\b.* 2 workers .*multiple of 2$", rank["few rows"])


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "expected"), [(8, None, 2, 1), (8, 2, 2, 2), (6, 1, 3, 2), (4, 4, 1, 1)]
)
def test_accumulation(batch, micro, workers, expected):
    config = training(batch_size=batch, micro_batch_size=micro)
    assert accumulation_steps(config, workers) == expected


def test_a_checkpoint_of_another_number_of_workers_is_refused(group):
    config = resume_config(0, "bfloat16")
    store = open_store(str(group[0]["folder"] / "resume-0"))
    engine = TorchEngine(MODULES["language"](), config, device="cpu")
    with pytest.raises(TrainingError, match="was written by 2 workers, this run has 1; use as many"):
        Checkpoints(store, "run", config.model_dump()).resume(engine)
