"""Tuning in place, as a customer's machine does it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from ot_ray.evaluation import mean_loss
from ot_ray.model import METHODS, LoraSettings, SplitPlan, prepare_tuning
from ot_ray.store import open_store
from ot_ray.training import Checkpoints, fit
from tests.fixtures.models import tiny_model
from tests.training.samples import sequences, training

PLAN = SplitPlan(bottom=1, keep=1, top=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_lowers_the_loss_and_keeps_types_and_frozen_weights(method, precision, dtype):
    model = tiny_model("llama", depth=3).to(dtype)
    before, start = {name: p.clone() for name, p in model.named_parameters()}, mean_loss(model, sequences())
    tuned = prepare_tuning(model, PLAN, method, LoraSettings(rank=4))
    dtypes = {name: p.dtype for name, p in tuned.named_parameters()}
    config = training(steps=20, precision=precision, batch_size=10, lr=1e-2, warmup_steps=0)
    plain = tuned.get_base_model() if method == "lora" else tuned
    result = fit(tuned, sequences(), config, evaluate=lambda: {"validation_loss": mean_loss(plain, sequences())})
    assert result.evaluations[-1]["validation_loss"] < start
    assert {name: p.dtype for name, p in tuned.named_parameters()} == dtypes
    assert not tuned.training
    assert mean_loss(plain, sequences()) == pytest.approx(result.evaluations[-1]["validation_loss"], rel=2e-2)
    middle = {name: p for name, p in before.items() if ".layers.1." in name or "embed" in name or "lm_head" in name}
    after = {name.replace("base_model.model.", ""): p for name, p in tuned.named_parameters()}
    assert middle and all(torch.equal(after[name], tensor) for name, tensor in middle.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fit_compiles_the_layers_where_it_is_asked_to_and_leaves_none_compiled():
    losses = []
    counters.clear()
    # Compiling in this process leaves no pool of compilers behind.
    with inductor_config.patch(compile_threads=1):
        for compiled in (False, True):
            model = prepare_tuning(tiny_model("opt", depth=3), PLAN, "lora", LoraSettings(rank=4))
            config = training(steps=3, batch_size=2, lr=1e-2, warmup_steps=0, compile=compiled)
            result = fit(model, sequences(), config)
            losses.append([figures["loss"] for figures in result.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert counters["stats"]["calls_captured"] > 0, "nothing was compiled"
    assert all(module._compiled_call_impl is None for module in model.modules())
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(method, tmp_path):
    def tuned(steps, checkpoints=None):
        torch.manual_seed(0)
        model = prepare_tuning(tiny_model("opt", depth=3), PLAN, method, LoraSettings(rank=4))
        config = training(steps=steps, schedule="constant", checkpoint_every=2)
        done = []
        fit(model, sequences(), config, checkpoints=checkpoints, report=lambda figures: done.append(figures["step"]))
        learnt = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return learnt, done

    def checkpoints():
        return Checkpoints(open_store(str(tmp_path)), "run", {"method": method})

    tuned(3, checkpoints())
    (resumed, steps), (whole, _) = tuned(6, checkpoints()), tuned(6)
    assert steps == [4, 5, 6]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
