"""Which checkpoint a run goes on from, and which it will not touch. Kills are in test_resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ot_ray.errors import TrainingError
from ot_ray.store import open_store
from ot_ray.training import Checkpoints, TorchEngine, train
from tests.training.samples import Dropped, stream, training

CONFIG = training(steps=8, checkpoint_every=2, keep_checkpoints=3)


def checkpoints(folder, **changes):
    return Checkpoints(open_store(folder), "runs/a", {**CONFIG.model_dump(), **changes})


def run(folder, config=CONFIG, **changes):
    engine = TorchEngine(Dropped(), config, device="cpu")
    kept = checkpoints(folder, **changes) if folder else None
    result = train(engine, stream(config), config, checkpoints=kept)
    return [(f["step"], f["loss"], f["lr"], f["grad_norm"]) for f in result.history], engine.trainable_state()


@pytest.fixture
def finished(store_folder):
    run(store_folder)
    return Path(store_folder) / "runs/a"


def test_the_latest_are_kept_and_the_end_needs_none(finished, store_folder):
    assert checkpoints(store_folder).committed() == [2, 4, 6]
    assert sorted(path.name for path in finished.iterdir() if list(path.rglob("*.*"))) == [
        "step-00000002",
        "step-00000004",
        "step-00000006",
    ]
    shutil.rmtree(finished)
    short = CONFIG.model_copy(update={"keep_checkpoints": 1})
    run(store_folder, short)
    assert checkpoints(store_folder).committed() == [6]
    assert not list((finished / "step-00000004").rglob("*.*"))


def test_a_resumed_run_has_the_losses_and_weights_of_one_that_was_not(finished, store_folder):
    whole, weights = run(None)
    resumed, resumed_weights = run(store_folder)
    assert resumed == whole[6:]
    assert all(torch.equal(weights[name], tensor) for name, tensor in resumed_weights.items())


def test_without_its_commit_a_checkpoint_is_ignored(finished, store_folder):
    (finished / "step-00000006/commit.json").unlink()
    assert checkpoints(store_folder).committed() == [2, 4]
    assert run(store_folder)[0] == run(None)[0][4:]
    assert checkpoints(store_folder).committed() == [2, 4, 6]


def test_half_uploaded_files_are_ignored_and_replaced(finished, store_folder):
    (finished / "step-00000006/commit.json").unlink()
    (finished / "step-00000006/engine.pt").write_bytes(b"half of it")
    (finished / "step-00000008").mkdir()
    (finished / "step-00000008/rank-0.pt").write_bytes(b"half of it")
    whole = run(None)[0]
    assert run(store_folder)[0] == whole[4:]
    assert run(store_folder)[0] == whole[6:]


def test_a_checkpoint_of_another_configuration_is_refused(finished, store_folder):
    with pytest.raises(TrainingError) as caught:
        run(store_folder, lr=0.5, data_digest="other")
    message = str(caught.value)
    assert "runs/a/step-00000006 belongs to another run: data_digest, lr changed; give the run another name" in message
    assert checkpoints(store_folder).committed() == [2, 4, 6]


def test_a_tampered_engine_file_does_not_run_code(finished, store_folder):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (finished / "ran",))

    torch.save({"weights": Evil()}, finished / "step-00000006/engine.pt")
    with pytest.raises(Exception, match=r"(?i)weights.?only|unsupported"):
        run(store_folder)
    assert not (finished / "ran").exists()


def test_runs_do_not_see_each_other(finished, store_folder):
    assert Checkpoints(open_store(store_folder), "runs", {}).committed() == []
    assert Checkpoints(open_store(store_folder), "runs/ab", {}).committed() == []
