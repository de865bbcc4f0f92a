"""Progress as a person sees it: lines in a log, one redrawn bar on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from ot_ray.progress import Progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_the_start_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tune", 50, line_interval=3600.0) as bar:
        for step in range(50):
            bar.advance(loss=1.0 / (step + 1), phase="warm")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("tune") and "1/50" in lines[0] and "loss 1 phase warm" in lines[0]
    assert "50/50" in lines[1] and "100%" in lines[1] and "loss 0.02" in lines[1]


def test_a_line_for_each_step_where_the_interval_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tune", 3, line_interval=0.0) as bar:
        bar.advance()
        bar.advance(2)
    assert ["1/3" in line or "3/3" in line for line in capsys.readouterr().err.splitlines()] == [True, True]


def test_a_resumed_run_starts_in_the_middle(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("distil", 100, line_interval=3600.0) as bar:
        bar.at(61)
        bar.at(62)
    lines = capsys.readouterr().err.splitlines()
    assert "61/100" in lines[0] and "62/100" in lines[1]


def test_the_last_state_is_shown_when_a_run_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Progress("tune", 9, line_interval=3600.0) as bar:
            bar.advance()
            bar.advance(4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "5/9" in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_gets_one_line_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("tune", 2) as bar:
        bar.advance()
        bar.advance()
    shown = screen.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n")
    assert shown.startswith("\rtune") and "2/2" in shown.rpartition("\r")[2]


def test_track_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([3, 1, 2], "reading", unit="file")) == [3, 1, 2]
    assert "3/3" in capsys.readouterr().err
    assert list(track(iter("ab"), "reading", unit="file")) == ["a", "b"]
    assert "2file" in capsys.readouterr().err
