"""The plain engine and the loop against a training loop written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ot_ray.errors import TrainingError
from ot_ray.model import LanguageModel
from ot_ray.training import TorchEngine, train
from tests.fixtures.models import tiny_model
from tests.training.samples import Dropped, distill_model, language_model, stream, training


def by_hand(config):
    """AdamW on the whole batch in one pass; the formulas are written anew, from their definitions."""
    module = language_model().train()
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in learning if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in learning if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=config.betas,
    )
    batches, history = stream(config), []
    for step in range(config.steps):
        share = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        decay = math.cos(math.pi * share / 2) ** 2 if config.schedule == "cosine" else 1 - share
        warm = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
        lr = config.lr * (warm if step < config.warmup_steps else decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batches.next_batch()
        logits = module.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in learning))
        if config.grad_clip and norm > config.grad_clip:
            for p in learning:
                p.grad.mul_(config.grad_clip / norm)
        optimizer.step()
        history.append({"loss": loss.item(), "lr": lr, "grad_norm": norm.item()})
    return history, {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize(("clip", "schedule"), [(0.5, "cosine"), (0.0, "linear")])
def test_losses_and_weights_are_those_of_a_loop_by_hand(micro, clip, schedule):
    config = training(micro_batch_size=micro, grad_clip=clip, schedule=schedule)
    expected, weights = by_hand(config)
    engine = TorchEngine(language_model(), config, device="cpu")
    history = train(engine, stream(config), config).history
    for name in ("loss", "lr", "grad_norm"):
        # Sums in another order: a few float32 roundings.
        assert [f[name] for f in history] == pytest.approx([f[name] for f in expected], rel=2e-5)
    state = engine.trainable_state()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        # AdamW divides by the gradient's own size, which lifts the roundings of small gradients.
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("make", [language_model, distill_model])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_run_and_the_loss_falls(make, precision):
    config = training(precision=precision, steps=12)
    runs = [train(TorchEngine(make(), config, device="cpu"), stream(config), config).history for _ in range(2)]
    losses = [[figures["loss"] for figures in run] for run in runs]
    assert losses[0] == losses[1]
    assert sum(losses[0][-3:]) < sum(losses[0][:3])


def test_the_seed_decides_dropout():
    runs = [
        train(TorchEngine(Dropped(), training(seed=seed), device="cpu"), stream(training()), training(seed=seed))
        for seed in (1, 1, 2)
    ]
    losses = [[figures["loss"] for figures in run.history] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_frozen_weights_have_no_gradient_and_no_optimiser_state(tmp_path):
    module, config = distill_model(), training()
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    engine = TorchEngine(module, config, device="cpu")
    train(engine, stream(config), config)
    parameters = dict(engine.module.named_parameters())
    assert all(parameters[name].grad is None and torch.equal(parameters[name], t) for name, t in frozen.items())
    engine.save(tmp_path)
    state = torch.load(tmp_path / "engine.pt", weights_only=True)
    assert state["weights"].keys() == engine.trainable_state().keys() == learning
    assert len(state["optimizer"]["state"]) == len(learning)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_of_a_bfloat16_model_learn_in_float32(precision):
    model = tiny_model("llama", depth=3).bfloat16()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    config = training(precision=precision, lr=1e-4)
    engine = TorchEngine(LanguageModel(model), config, device="cpu")
    before = engine.trainable_state()
    train(engine, stream(config), config)
    after = engine.trainable_state()
    # A step of 1e-4 is lost in bfloat16 where a weight is above 0.03.
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before if before[name].dim() > 1])
    assert (moved != 0).float().mean() > 0.99
    assert model.lm_head.weight.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)


def test_nothing_to_learn_is_refused():
    with pytest.raises(TrainingError, match="no parameter of the model has gradients; choose a tuning method"):
        TorchEngine(Dropped().requires_grad_(False), training(), device="cpu")


def test_a_batch_that_does_not_divide_is_refused_before_any_step():
    with pytest.raises(TrainingError, match=r"batch_size is 4, .* micro_batch_size 3; use a multiple of 3"):
        TorchEngine(Dropped(), training(micro_batch_size=3), device="cpu")


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    config = training()
    TorchEngine(Dropped(), config, device="cpu").save(tmp_path)
    other = Dropped()
    other.net[0] = torch.nn.Linear(16, 1)
    engine = TorchEngine(other, config, device="cpu")
    before = engine.trainable_state()
    with pytest.raises(TrainingError, match=r"net\.0\.bias of shape \(.*\) is in one of them only; resume with"):
        engine.load(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.trainable_state().items())
