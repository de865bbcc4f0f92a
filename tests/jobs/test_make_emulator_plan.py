"""`--plan`: told before anything runs, without weights, and refused where it cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import make_emulator
from jobs.command import config_file
from jobs.emulator.planned import show_plan
from ot_ray.config import load
from tests.jobs.conftest import Command, Ended
from tests.jobs.nights import night_config
from tests.jobs.scene import DEPTH, listing

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


@pytest.mark.parametrize(
    ("emulator", "said"),
    [
        ({}, []),
        ({"layers": "cka"}, ["one worker chooses layers by cka with the full model", "what layers return"]),
        ({"layers": "gradient"}, ["one worker chooses layers by gradient with the full model", "gradients of public"]),
        (
            {"attention_rank": 0.25},
            ["works out the smaller maps with the full model", "emulator.attention_rank changes"],
        ),
        ({"sparsity": 0.5, "bits": 4}, ["emulator.sparsity, emulator.bits changes; E is planned with layers as large"]),
    ],
)
def test_what_a_plan_leaves_out_is_said(
    emulator: dict[str, object], said: list[str], scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_plan(night_config(scene, emulator=emulator, hardware="cpu"))
    text = capsys.readouterr().out
    assert all(part in text for part in said)
    one_worker, shapes = bool({"layers", "attention_rank"} & emulator.keys()), bool(emulator.keys() - {"layers"})
    assert text.count("Not in the plan: ") == one_worker + shapes


def test_layers_that_all_stay_need_no_worker_to_choose(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"bottom": 1, "keep": DEPTH - 2, "top": 1}
    show_plan(night_config(scene, split=whole, emulator={"layers": "gradient", "bits": 4}, hardware="cpu"))
    assert "one worker" not in capsys.readouterr().out


def test_the_settings_that_ship_are_a_night_s() -> None:
    config = load(make_emulator.MakeEmulatorConfig, config_file("make_emulator.yaml"))
    assert isinstance(config.workers.count, tuple)
    assert (config.version, config.run, config.on_busy) == (None, None, "leave")
    assert config.validation is not None and config.gate.min_gap > 0
    assert config.training.batch_size >= config.workers.most


@pytest.mark.parametrize("switch", ["--plan", "--retry"])
def test_the_help_tells_of_the_switches(switch: str, command: Command) -> None:
    assert switch in command("make_emulator", "--help").out
