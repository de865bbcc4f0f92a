"""What the loop reports, when it looks at the validation split, and what it does with a loss that is lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ot_ray.errors import TrainingError
from ot_ray.store import open_store
from ot_ray.training import Checkpoints, TorchEngine, train
from tests.training.samples import LENGTH, Dropped, stream, training


class Explodes(nn.Module):
    """The loss, or only its gradient, is not a number from the third pass on."""

    def __init__(self, what):
        super().__init__()
        self.inner, self.what, self.passes = Dropped(), what, 0

    def forward(self, **batch):
        self.passes += 1
        loss = self.inner(**batch)["loss"]
        if self.passes >= 3:
            loss = loss * float("inf") if self.what == "loss" else loss + torch.sqrt(loss * 0.0)
        return {"loss": loss}


def run(config, module=None, **options):
    return train(TorchEngine(module or Dropped(), config, device="cpu"), stream(config), config, **options)


def test_every_step_is_reported_once_with_its_figures():
    seen = []
    result = run(training(), report=lambda figures: seen.append(dict(figures)))
    assert seen == result.history
    assert [figures["step"] for figures in seen] == [1, 2, 3, 4, 5, 6]
    assert {"step", "lr", "loss", "grad_norm", "tokens_per_s"} == seen[0].keys()
    assert all(figures["tokens_per_s"] > 0 for figures in seen)


def test_batches_come_in_the_streams_order():
    shown = []

    class Recorder(Dropped):
        def forward(self, **batch):
            assert self.training
            shown.append(batch["input_ids"].clone())
            return super().forward(**batch)

    config = training(micro_batch_size=2)
    run(config, Recorder())
    expected = stream(config)
    whole = torch.cat([expected.next_batch()["input_ids"] for _ in range(config.steps)])
    assert [rows.shape for rows in shown] == [(2, LENGTH)] * 12
    assert torch.equal(torch.cat(shown), whole)


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (2, [2, 4, 6]), (4, [4, 6]), (9, [6])])
def test_the_validation_split_is_looked_at_on_time_and_at_the_end(every, steps):
    config = training(evaluate_every=every)
    engine = TorchEngine(Dropped(), config, device="cpu")
    modes = []

    def evaluate():
        modes.append(engine.module.training)
        return {"validation_loss": float(len(modes))}

    result = train(engine, stream(config), config, evaluate=evaluate)
    assert result.evaluations == [{"step": step, "validation_loss": i + 1.0} for i, step in enumerate(steps)]
    assert [f["step"] for f in result.history if "validation_loss" in f] == steps
    assert modes == [False] * len(steps) and not engine.module.training


def test_looking_does_not_change_the_run():
    looked = run(training(evaluate_every=1), evaluate=lambda: {"validation_loss": 1.0})
    assert [f["loss"] for f in looked.history] == [f["loss"] for f in run(training()).history]


@pytest.mark.parametrize(("what", "text"), [("loss", "the loss became inf"), ("gradient", "norm became nan")])
def test_what_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(what, text, store_folder):
    config = training(checkpoint_every=1)
    checkpoints = Checkpoints(open_store(store_folder), "run", {})
    seen = []
    with pytest.raises(TrainingError, match=rf"{text} at step 3 \(seen by rank 0\); lower training\.lr"):
        run(config, Explodes(what), checkpoints=checkpoints, report=lambda figures: seen.append(figures["step"]))
    assert seen == [1, 2]
    assert checkpoints.committed() == [1, 2]
    resumed = run(config, checkpoints=checkpoints, module=Renamed())
    assert [figures["step"] for figures in resumed.history] == [3, 4, 5, 6]


class Renamed(nn.Module):
    """A healthy module with the parameters of `Explodes`."""

    def __init__(self):
        super().__init__()
        self.inner = Dropped()

    def forward(self, **batch):
        return self.inner(**batch)
