"""What rank 0 shows of a distillation: a bar for a person, lines of JSON for a program."""

from __future__ import annotations

import json

import pytest

from jobs.emulator.worker import Shown
from ot_ray.launch.cluster import ClusterAddress

pytestmark = pytest.mark.slow

FIGURES = {"loss": 4.0, "lm_loss": 3.0, "kd_loss": 0.25, "tokens_per_s": 12345.0, "data_wait_share": 0.25, "mfu": 0.5}


def shown(log: str, start: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    with Shown("tiny", 3, log) as screen:  # type: ignore[arg-type]
        for step in (1, 2, 3):
            screen.report({**FIGURES, "step": step, "seconds": 2.0})
    output = capsys.readouterr()
    assert output.out == ""
    # A Ray that runs in this process may forward its workers' lines in between; those start with a name.
    return [line for line in output.err.splitlines() if line.startswith(start)]


@pytest.mark.usefixtures("local_ray")
def test_the_bar_shows_speed_losses_waiting_and_use(capsys: pytest.CaptureFixture[str]) -> None:
    last = shown("bar", "distil", capsys)[-1]
    for part in ("3/3", "lm 3", "kd 0.25", "tokens/s 12,345", "wait 25%", "mfu 50%", "<"):
        assert part in last


def test_every_step_is_a_line_of_json(local_ray: ClusterAddress, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [json.loads(text) for text in shown("json", "{", capsys)]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step.items() >= FIGURES.items() for step in steps)
    # After the first step alone, each of the others is expected to take as long.
    assert steps[0]["seconds_left"] == 4.0
    assert steps[-1]["seconds_left"] == 0.0
