"""`--plan`: told before anything runs, without weights, and refused where it cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import make_emulator
from jobs.command import config_file
from ot_ray.config import load
from tests.jobs.conftest import Command, Ended
from tests.jobs.scene import listing

MIB = 2**20


def plan(command: Command, scene: Path, memory: int) -> Ended:
    # Weights, text and tokenizer are not read: they need not be there.
    for path in (scene / "full").iterdir():
        if path.name != "config.json":
            path.unlink()
    before = listing(scene)
    ended = command(
        "make_emulator",
        "--plan",
        "model.name=tiny",
        f"model.source={scene}/full",
        "data={source: nowhere}",
        "validation=null",
        "gate={}",
        "split={bottom: 1, keep: 2, top: 1}",
        "sequence_length=16",
        "training={steps: 2, batch_size: 2, lr: 1e-3}",
        "workers={count: 2, gpus: 1}",
        f"store={scene}/owner",
        f"hardware={{name: a small card, memory_bytes: {memory}}}",
    )
    assert listing(scene) == before
    return ended


def test_a_plan_that_fits_is_printed(command: Command, scene: Path) -> None:
    ended = plan(command, scene, 512 * MIB)
    assert ended.code == 0, ended.err
    assert "a small card" in ended.out
    assert ended.err == ""


def test_a_plan_that_cannot_fit_is_refused(command: Command, scene: Path) -> None:
    ended = plan(command, scene, MIB // 64)
    assert ended.code == 2
    assert "a small card" in ended.out
    assert ended.err.startswith("error: ")
    assert "fit" in ended.err


def test_the_settings_that_ship_are_a_night_s() -> None:
    config = load(make_emulator.MakeEmulatorConfig, config_file("make_emulator.yaml"))
    assert isinstance(config.workers.count, tuple)
    assert (config.version, config.run, config.on_busy) == (None, None, "leave")
    assert config.validation is not None and config.gate.min_gap > 0
    assert config.training.batch_size >= config.workers.most


@pytest.mark.parametrize("switch", ["--plan", "--retry"])
def test_the_help_tells_of_the_switches(switch: str, command: Command) -> None:
    assert switch in command("make_emulator", "--help").out
