"""Runs that are killed with SIGKILL, between two checkpoints or while one is written, go on as if nothing had
happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.training.resuming import KILLED_AT, checkpoints_in, run_to_the_end, run_until_killed, trained
from tests.training.samples import PATIENCE, run_group, started_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]


def _figures(history: list[dict[str, float]]) -> list[tuple[float, ...]]:
    return [tuple(figures[name] for name in ("step", "loss", "lr", "grad_norm")) for figures in history]


def _kill_in_the_middle(world_size: int, *args: object) -> None:
    with started_group(run_until_killed, world_size, *args) as processes:
        processes[0].join(PATIENCE)
        assert processes[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("writing", "committed"), [(False, [2, 4]), (True, [2])])
def test_one_process_of_plain_pytorch(writing: bool, committed: list[int], store_folder: str) -> None:
    _kill_in_the_middle(1, store_folder, "torch", writing)
    checkpoints = checkpoints_in(store_folder)
    assert checkpoints.committed() == committed
    resumed = _figures(trained("torch", checkpoints).history)
    assert resumed == _figures(trained("torch", None).history)[committed[-1] :]
    assert checkpoints.committed() == [6, 7]
    # Nothing of the checkpoint that was cut short is left.
    assert {path.name for path in (Path(store_folder) / "run").iterdir()} == {"step-00000006", "step-00000007"}


@pytest.mark.timeout(2 * PATIENCE + 60)
def test_two_processes_of_zero_3(store_folder: str, tmp_path: Path) -> None:
    _kill_in_the_middle(2, store_folder, "deepspeed", False)
    assert checkpoints_in(store_folder).committed() == [2, 4]
    run_group(run_to_the_end, 2, store_folder, tmp_path)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert [figures["step"] for figures in seen["resumed"]] == [KILLED_AT, 6, 7]
        assert _figures(seen["resumed"]) == _figures(seen["whole"])[4:]
    assert checkpoints_in(store_folder).committed() == [6, 7]
