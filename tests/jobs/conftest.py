"""The scene of the bad-input tests, a verb's command line in this process, and the base of the pipeline."""

from __future__ import annotations

import runpy
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.jobs.scene import build


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def sound_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scene")
    build(place)
    return place


@pytest.fixture
def scene(sound_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scene that a test may spoil; temporary files of the verbs go into it too."""
    place = Path(shutil.copytree(sound_scene, tmp_path / "scene"))
    (place / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place / "temporary"))
    return place


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `python -m jobs.<verb> ...` in this process."""

    def run(verb: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"jobs.{verb}", *arguments])
        capsys.readouterr()
        code: object = 0
        with warnings.catch_warnings():
            # The module may be imported already; that it is executed again is what we want.
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                runpy.run_module(f"jobs.{verb}", run_name="__main__", alter_sys=True)
            except SystemExit as left:
                code = left.code
        shown = capsys.readouterr()
        assert isinstance(code, int)
        return Ended(code, shown.out, shown.err)

    return run
