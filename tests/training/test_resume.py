"""Runs that are killed with SIGKILL between two checkpoints go on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from ot_ray.store import open_store
from ot_ray.training import Checkpoints, TorchEngine, train
from tests.training.samples import PATIENCE, Dropped, run_group, start_group, stream
from tests.training.workers import KILLED_AT, resume_config, run_to_the_end, run_until_killed

pytestmark = pytest.mark.slow

COMPARED = ("step", "loss", "lr", "grad_norm")


def _tail(history):
    return [tuple(figures[name] for name in COMPARED) for figures in history if figures["step"] >= KILLED_AT]


def _kill_in_the_middle(world_size: int, *args: object) -> None:
    processes = start_group(run_until_killed, world_size, *args)
    try:
        processes[0].join(PATIENCE)
        assert processes[0].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_one_process_of_plain_pytorch(store_folder: str) -> None:
    config = resume_config(3)
    _kill_in_the_middle(1, store_folder, TorchEngine)
    checkpoints = Checkpoints(open_store(store_folder), "run", config.model_dump())
    assert checkpoints.committed() == [2, 4]
    resumed = train(TorchEngine(Dropped(), config, device="cpu"), stream(config), config, checkpoints=checkpoints)
    whole = train(TorchEngine(Dropped(), config, device="cpu"), stream(config), config)
    assert len(resumed.history) == 3
    assert _tail(resumed.history) == _tail(whole.history)


def test_two_processes_of_zero_3(store_folder: str, group: list[dict], tmp_path: Path) -> None:
    from ot_ray.training import DeepSpeedEngine

    _kill_in_the_middle(2, store_folder, DeepSpeedEngine)
    assert Checkpoints(open_store(store_folder), "run", {}).committed() == [2, 4]
    run_group(run_to_the_end, 2, store_folder, tmp_path)
    for rank in range(2):
        resumed = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(resumed) == 3
        assert _tail(resumed) == _tail(group[rank]["uninterrupted"])
