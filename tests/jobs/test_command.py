"""What the verbs' command lines share, besides bad input: help, results, interrupts, and errors that are ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.command import run_command
from ot_ray.config import Config, load
from tests.jobs.conftest import Command


class Greeting(Config):
    """A verb's configuration."""

    name: str
    """Whom to greet."""
    loud: bool = False
    """Whether to shout."""


class Voice(Config):
    """How somebody speaks."""

    pitch: float = 1.0
    """How high."""


class Letter(Config):
    """A letter."""

    to: str
    """An address."""
    voice: Voice = Voice(pitch=3.0)
    """Whose words."""


class Speech(Config):
    """A verb's configuration with sections of every kind."""

    main: Letter
    """The letter that is read."""
    voice: Voice = Voice(pitch=2.0)
    """Who reads it."""
    echo: Voice | None = None
    """Who repeats it; unset, nobody."""
    enclosed: Letter | None = None
    """A letter that goes along."""
    others: tuple[Letter, ...] = ()
    """Letters that wait."""
    more: list[Letter] | None = None
    """Letters that wait longer."""


HELP = """\
settings:
  main  (a section, required)
      The letter that is read.
  main.to  (required)
      An address.
  main.voice  (a section)
      Whose words.
  main.voice.pitch  (default 3.0)
      How high.
  voice  (a section)
      Who reads it.
  voice.pitch  (default 2.0)
      How high.
  echo  (off unless set; echo={} turns it on with defaults)
      Who repeats it; unset, nobody.
  echo.pitch  (default 1.0)
      How high.
  enclosed  (off unless set)
      A letter that goes along.
  enclosed.to  (required within it)
      An address.
  enclosed.voice  (a section)
      Whose words.
  enclosed.voice.pitch  (default 3.0)
      How high.
  others  (a list, default [])
      Letters that wait.
      Each of its items is a section with the settings of others[i].
  others[i].to  (required within it)
      An address.
  others[i].voice  (a section)
      Whose words.
  others[i].voice.pitch  (default 3.0)
      How high.
  more  (a list, default [])
      Letters that wait longer.
      Each of its items is a section with the settings of others[i].
"""


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


def test_help_says_of_sections_whether_they_are_on_and_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_command("speak", Speech, lambda config: None, ["--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.endswith(HELP)
    # What it says does so.
    assert load(Speech, None, ["main.to=ada", "echo={}"]).echo == Voice()


@pytest.mark.parametrize(
    ("verb", "setting"),
    [
        ("make_emulator", "split.keep"),
        ("tune", "training.lr"),
        ("plug_in", "limits.max_bytes"),
        ("evaluate", "bundle.folder"),
        ("evaluate", "harness"),
        ("tune", "search"),
        ("study", "workers.gpus"),
    ],
)
def test_help_names_every_setting(verb: str, setting: str, command: Command) -> None:
    ended = command(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"  {setting}  (" in ended.out
    assert f"python -m jobs.{verb}" in ended.out
