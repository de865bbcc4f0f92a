"""What the verbs' command lines share, besides bad input: help, results, interrupts, and errors that are ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.command import run_command
from ot_ray.config import Config
from tests.jobs.conftest import Command


class Greeting(Config):
    """A verb's configuration."""

    name: str
    """Whom to greet."""
    loud: bool = False
    """Whether to shout."""


def greet(config: Greeting) -> dict[str, Any]:
    """Greet somebody."""
    return {"greeting": config.name.upper() if config.loud else config.name}


def interrupted(config: Greeting) -> None:
    raise KeyboardInterrupt


def broken(config: Greeting) -> None:
    raise ZeroDivisionError("a fault of ours")


def test_a_result_is_json_and_switches_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    run_command("greet", Greeting, greet, ["--loud", "name=ada"])
    assert json.loads(capsys.readouterr().out) == {"greeting": "ADA"}
    run_command("greet", Greeting, greet, ["name=ada"])
    assert json.loads(capsys.readouterr().out) == {"greeting": "ada"}


def test_an_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_command("greet", Greeting, interrupted, ["name=ada"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_ours_keeps_its_stack_trace() -> None:
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        run_command("greet", Greeting, broken, ["name=ada"])


@pytest.mark.parametrize(
    ("verb", "setting"),
    [
        ("make_emulator", "split.keep"),
        ("tune", "training.lr"),
        ("plug_in", "limits.max_bytes"),
        ("evaluate", "bundle.folder"),
    ],
)
def test_help_names_every_setting(verb: str, setting: str, command: Command) -> None:
    ended = command(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"  {setting}  (" in ended.out
    assert f"python -m jobs.{verb}" in ended.out
