"""The plain engine against a training loop written out by hand, and the splitting of rows that all engines share."""

from __future__ import annotations

import pytest
import torch

from ot_ray.config import parse
from ot_ray.errors import ConfigError, TrainingError
from ot_ray.model import LanguageModel
from ot_ray.training import TorchEngine, TrainingConfig
from ot_ray.training.engine import micro_batches
from tests.fixtures.models import tiny_model
from tests.training.engines import (
    BATCH,
    MODULES,
    SAVED_AT,
    STEPS,
    Saved,
    engine_config,
    net,
    plain,
    run,
    save_pieces,
    whole_batch,
)
from tests.training.samples import Dropped, distill_model, language_model


def _engine(make=net, **values):
    return TorchEngine(make(), engine_config(**values), device="cpu")


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize(("clip", "schedule"), [(0.5, "cosine"), (0.0, "linear")])
@pytest.mark.parametrize("name", ["language", "net"])
def test_losses_and_weights_are_those_of_a_loop_by_hand(name, micro, clip, schedule):
    config = engine_config(micro_batch_size=micro, grad_clip=clip, schedule=schedule)
    expected, weights = plain(name, config)
    engine = TorchEngine(MODULES[name](), config, device="cpu")
    history = run(engine, config)
    for figure in ("loss", "grad_norm"):
        # Sums in another order: a few float32 roundings.
        assert [f[figure] for f in history] == pytest.approx([f[figure] for f in expected], rel=2e-5)
    state = engine.trainable_state()
    assert state.keys() == weights.keys()
    for key, tensor in weights.items():
        # AdamW divides by the gradient's own size, which lifts the roundings of small gradients.
        torch.testing.assert_close(state[key], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_size_of_a_pass_changes_no_figure_of_distilling(micro):
    whole, split = (run(_engine(distill_model, micro_batch_size=size), engine_config()) for size in (None, micro))
    for one, other in zip(whole, split, strict=True):
        assert other == pytest.approx(one, rel=2e-5)


@pytest.mark.parametrize("make", [language_model, distill_model])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_run_and_the_loss_falls(make, precision):
    runs = []
    for _ in range(2):
        engine = _engine(make, precision=precision)
        runs.append([engine.step(whole_batch(0), 3e-3)["loss"] for _ in range(8)])
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.9 * runs[0][0]


def test_the_random_state_decides_dropout():
    losses = []
    for seed in (1, 1, 2):
        engine = _engine(Dropped)
        torch.manual_seed(seed)
        losses.append([figures["loss"] for figures in run(engine, engine_config())])
    assert losses[0] == losses[1] != losses[2]


def test_frozen_weights_have_no_gradient_and_nothing_to_save():
    module = distill_model()
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    learning = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    engine = TorchEngine(module, engine_config(), device="cpu")
    run(engine, engine_config())
    parameters = dict(engine.module.named_parameters())
    assert all(parameters[name].grad is None and torch.equal(parameters[name], t) for name, t in frozen.items())
    assert engine.sizes() == learning
    assert {(kind, name) for kind, name, *_ in engine.pieces()} == {
        (kind, name) for kind in ("weight", "exp_avg", "exp_avg_sq") for name in learning
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_of_a_bfloat16_model_learn_in_float32(precision):
    model = tiny_model("llama", depth=3).bfloat16()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    config = engine_config(precision=precision, lr=1e-4)
    engine = TorchEngine(LanguageModel(model), config, device="cpu")
    before = engine.trainable_state()
    run(engine, config)
    after = engine.trainable_state()
    # A step of 1e-4 is lost in bfloat16 where a weight is above 0.03.
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before if before[name].dim() > 1])
    assert (moved != 0).float().mean() > 0.99
    assert model.lm_head.weight.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)


def test_a_restored_engine_goes_on_bit_for_bit(tmp_path):
    config = engine_config()
    engine = _engine()
    run(engine, config, range(SAVED_AT))
    pieces = list(engine.pieces())
    copies = [piece.tensor.clone() for piece in pieces]
    save_pieces(engine, tmp_path)
    tail = run(engine, config, range(SAVED_AT, STEPS))
    assert all(torch.equal(piece.tensor, copy) for piece, copy in zip(pieces, copies, strict=True))
    again = _engine()
    run(again, config, range(1))
    again.restore(SAVED_AT, Saved(tmp_path, again.sizes()).read)
    assert run(again, config, range(SAVED_AT, STEPS)) == tail


def test_before_the_first_step_the_moments_are_0():
    engine, module = _engine(), net()
    whole = {(piece.kind, piece.name): piece for piece in engine.pieces()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(whole["weight", name].tensor, parameter.detach().flatten())
            assert all(not whole[kind, name].tensor.any() for kind in ("exp_avg", "exp_avg_sq"))


def test_values_of_another_size_are_refused():
    engine = _engine()
    for count in (1, 65):
        with pytest.raises(TrainingError, match=rf": {count} values were read for elements 0 to \d+; resume with"):
            engine.restore(1, lambda kind, name, start, end: torch.zeros(count))  # noqa: B023


def test_nothing_to_learn_is_refused():
    with pytest.raises(TrainingError, match="no parameter of the model has gradients; choose a tuning method"):
        TorchEngine(Dropped().requires_grad_(False), engine_config(), device="cpu")


def test_a_batch_of_other_rows_is_refused():
    with pytest.raises(TrainingError, match=r"rank 0 of 1 was given 3 rows; training\.batch_size 4 makes 4"):
        _engine().step(whole_batch(0, 3), 1e-3)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "counts"),
    [
        (8, None, 2, [[4], [4]]),
        (8, 2, 2, [[2, 2], [2, 2]]),
        (4, None, 3, [[2], [1], [1]]),
        (4, 1, 3, [[1, 1], [1, 0], [1, 0]]),
        (7, 2, 2, [[2, 2], [2, 1]]),
        (9, 4, 2, [[4, 1], [4, 0]]),
        (4, 9, 1, [[4]]),
    ],
)
def test_every_rank_makes_as_many_passes_and_each_row_counts_once(batch, micro, ranks, counts):
    config = engine_config(batch_size=batch, micro_batch_size=micro)
    seen, rows = [], torch.arange(batch)
    for rank, passes in enumerate(counts):
        share = sum(passes)
        own, rows = rows[:share], rows[share:]
        made = micro_batches({"row": own}, config, rank, ranks)
        assert [count for _, count in made] == passes
        assert all(len(part["row"]) == max(1, count) for part, count in made)
        seen += [row for part, count in made if count for row in part["row"].tolist()]
    assert seen == list(range(batch))


def test_more_ranks_than_rows_are_refused():
    with pytest.raises(ConfigError, match=f"batch_size is {BATCH}"):
        micro_batches(whole_batch(0), engine_config(), 0, BATCH + 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offload_optimizer": True}, "offload_optimizer is on, but zero_stage is 0; it needs 1 or more"),
        ({"offload_parameters": True, "zero_stage": 2}, "offload_parameters is on, but zero_stage is 2; it needs 3"),
        ({"store_patience_s": -1}, "store_patience_s"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainingConfig, {"steps": 1, **values}, "test")


def test_what_decides_the_losses_and_what_does_not():
    decisive = {
        "steps", "batch_size", "lr", "schedule", "warmup_steps", "final_lr_share", "weight_decay", "betas", "grad_clip",
        "precision", "seed",
    }  # fmt: skip
    assert TrainingConfig(steps=3).decisive().keys() == decisive
    base = {"steps": 3, "zero_stage": 3}
    same = {"micro_batch_size": 1, "offload_parameters": True, "compile": True, "checkpoint_every": 1}
    assert TrainingConfig(**base, **same).decisive() == TrainingConfig(**base).decisive()
    assert TrainingConfig(**base, precision="bfloat16").decisive() != TrainingConfig(**base).decisive()
