"""What the loop reports, when it looks at the validation split, and what it does with a loss that is lost."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from ot_ray.data import BatchStream, TokenSpan, pack
from ot_ray.errors import DataError, StoreFullError, TrainingError
from ot_ray.store import LocalStore, open_store
from ot_ray.training import Checkpoints, TorchEngine, train
from tests.fixtures.models import tokens
from tests.training.replicas import plain, run_ranks
from tests.training.samples import LENGTH, Dropped, stream, training


class Explodes(nn.Module):
    """The loss, or only its gradient, is not a number from a pass on."""

    def __init__(self, what, inner=None, at=3):
        super().__init__()
        self.inner, self.what, self.at, self.passes = inner or Dropped(), what, at, 0

    def forward(self, **batch):
        self.passes += 1
        loss = self.inner(**batch)["loss"]
        if self.passes >= self.at:
            loss = loss * float("inf") if self.what == "loss" else loss + torch.sqrt(loss * 0.0)
        return {"loss": loss}


class Renamed(nn.Module):
    """A healthy module with the parameters of `Explodes`."""

    def __init__(self):
        super().__init__()
        self.inner = Dropped()

    def forward(self, **batch):
        return self.inner(**batch)


class Slow:
    """A stream whose every batch takes a while."""

    def __init__(self, inner, seconds):
        self._inner, self._seconds = inner, seconds

    def next_batch(self, *place):
        time.sleep(self._seconds)
        return self._inner.next_batch(*place)


class Dry:
    """A stream with no more than two batches."""

    def __init__(self, inner):
        self._inner, self._left = inner, 2
        self.state = inner.state

    def next_batch(self, *place):
        if not self._left:
            raise DataError("the source dried up after 8 sequences; add text")
        self._left -= 1
        return self._inner.next_batch(*place)


class Late(LocalStore):
    """Its uploads end only after it was told that the run has failed, and a moment later."""

    def __init__(self, root):
        super().__init__(root)
        self.failed = threading.Event()

    def upload(self, path, key, progress=None):
        assert self.failed.wait(120)
        time.sleep(0.2)
        return super().upload(path, key, progress)


def run(config, module=None, batches=None, **options):
    engine = TorchEngine(module or Dropped(), config, device="cpu")
    return train(engine, batches or stream(config), config, **options)


def test_every_step_is_reported_once_with_its_figures():
    seen = []
    result = run(training(), report=lambda figures: seen.append(dict(figures)))
    assert seen == result.history
    assert [figures["step"] for figures in seen] == [1, 2, 3, 4, 5, 6]
    measured = {"seconds", "data_wait", "data_wait_share", "tokens_per_s"}
    assert {"step", "lr", "loss", "grad_norm", *measured} == seen[0].keys()
    for figures in seen:
        assert figures["tokens_per_s"] == pytest.approx(4 * LENGTH / figures["seconds"])


def test_waiting_for_data_is_told_from_computing():
    config = training(steps=3)
    slow = run(config, batches=Slow(stream(config), 0.1)).history
    for figures in slow:
        assert 0.1 <= figures["data_wait"] < figures["seconds"]
        assert figures["data_wait_share"] == figures["data_wait"] / figures["seconds"]
    quick = run(config).history
    assert min(figures["data_wait"] for figures in quick) < 0.1


def test_tokens_of_all_workers_are_counted_whatever_their_share():
    config = training(batch_size=5, steps=2)
    for result in run_ranks(2, config, lambda engine: train(engine, stream(config), config)):
        for figures in result.history:
            assert figures["tokens_per_s"] == pytest.approx(5 * LENGTH / figures["seconds"])


def test_padding_is_no_token():
    config = training(batch_size=2, steps=2, micro_batch_size=1)
    ids = tokens(2, LENGTH).tolist()
    spans = [TokenSpan(row[:size], [True] * size, splittable=False) for row, size in zip(ids, (3, 5), strict=True)]
    rows = [pack([span], LENGTH, pad_id=0)[0] for span in spans]
    for figures in run(config, batches=BatchStream(rows, 2, seed=0)).history:
        assert figures["tokens_per_s"] == pytest.approx(8 / figures["seconds"])


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


def test_a_run_that_was_done_is_looked_at_once_more(store_folder):
    config = training(checkpoint_every=4, evaluate_every=2)
    checkpoints = Checkpoints(open_store(store_folder), "run", {})
    run(config, checkpoints=checkpoints)
    engine = TorchEngine(Dropped(), config, device="cpu")
    looks = []
    result = train(
        engine, stream(config), config, checkpoints=checkpoints, evaluate=lambda: looks.append(1) or {"v": 1.0}
    )
    assert result.history == [] and result.evaluations == [{"step": 6, "v": 1.0}] and looks == [1]
    assert not engine.module.training


def test_looking_does_not_change_the_run():
    looked = run(training(evaluate_every=1), evaluate=lambda: {"validation_loss": 1.0})
    assert [f["loss"] for f in looked.history] == [f["loss"] for f in run(training()).history]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("loss", "the loss became inf at step 3 on the rows of rank 0"),
        ("gradient", "the gradients' norm became nan at step 3 though every rank's loss is finite"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(what, text, store_folder):
    config = training(checkpoint_every=1)
    checkpoints = Checkpoints(open_store(store_folder), "run", {})
    seen = []
    with pytest.raises(TrainingError, match=rf"{text}; the last checkpoint is step 2; lower training\.lr"):
        run(config, Explodes(what), checkpoints=checkpoints, report=lambda figures: seen.append(figures["step"]))
    assert seen == [1, 2]
    assert checkpoints.committed() == [1, 2]
    resumed = run(config, checkpoints=checkpoints, module=Renamed())
    assert [figures["step"] for figures in resumed.history] == [3, 4, 5, 6]


def test_the_error_names_the_ranks_whose_loss_is_lost_on_every_rank(store_folder):
    config = training(checkpoint_every=2)

    def make(rank):
        # A replica passes its own rows, then all rows: the sixth and later passes are those of step 3 and after.
        return Explodes("loss" if rank == 1 else "nothing", plain(), at=5 if rank == 1 else 99)

    def work(engine):
        engine_step = engine.step

        def step(batch, lr):
            figures = engine_step(batch, lr)
            # As an engine's figures are, the same on all ranks: the mean over them.
            return {**figures, "loss": engine.mean({"loss": engine.local_loss})["loss"]}

        engine.step = step
        train(engine, stream(config), config, checkpoints=Checkpoints(open_store(store_folder), "run", {}))

    for error in run_ranks(3, config, work, make):
        assert isinstance(error, TrainingError)
        assert "the loss became inf at step 3 on the rows of rank 1; the last checkpoint is step 2;" in str(error)


def test_without_checkpoints_the_error_says_so():
    with pytest.raises(TrainingError, match=r"at step 1 .*; no checkpoint was taken; lower"):
        run(training(), Explodes("loss", at=1))


def test_a_source_that_dries_up_loses_no_checkpoint(store_folder):
    config, store = training(checkpoint_every=2), Late(store_folder)
    checkpoints = Checkpoints(store, "run", {})

    class Telling(Dry):
        def next_batch(self, *place):
            try:
                return super().next_batch(*place)
            except DataError:
                store.failed.set()
                raise

    with pytest.raises(DataError, match="dried up after 8 sequences"):
        run(config, batches=Telling(stream(config)), checkpoints=checkpoints)
    assert checkpoints.committed() == [2]


def test_a_checkpoint_that_fails_hides_no_other_error(store_folder):
    class Full(LocalStore):
        def upload(self, path, key, progress=None):
            raise StoreFullError("no room; free some")

    config = training(checkpoint_every=2)
    with pytest.raises(DataError, match="dried up"):
        run(config, batches=Dry(stream(config)), checkpoints=Checkpoints(Full(store_folder), "run", {}))
    with pytest.raises(StoreFullError, match="free some"):
        run(config, checkpoints=Checkpoints(Full(store_folder), "run", {}))


def test_no_thread_is_left_behind(store_folder):
    config = training(checkpoint_every=1)
    run(config, checkpoints=Checkpoints(open_store(store_folder), "run", {}))
    with pytest.raises(DataError):
        run(config, batches=Dry(stream(config)), checkpoints=Checkpoints(open_store(store_folder), "other", {}))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-")] == []
