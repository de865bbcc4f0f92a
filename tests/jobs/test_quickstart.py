"""The main job as a person runs it: the command, its six steps, and Ctrl-C in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from matplotlib import image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Enough to hold the promises with room, on the base that ships.
SMALL = [
    "distil.steps=30",
    "distil.warmup_steps=5",
    "distil.checkpoint_every=20",
    "tune.steps=40",
    "tune.evaluate_every=0",
    "sequence_length=128",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command in a session of its own, as a terminal gives it one."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.quickstart", *SMALL, f"folder={folder}", f"port={free_port()}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def left_over(family: list[psutil.Process]) -> list[str]:
    """Processes of a family that are still there a moment after its head ended."""
    _, alive = psutil.wait_procs(family, timeout=15)
    return [str(process) for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    """A process and its descendants, cleared away should a test fail before they end."""
    members: list[psutil.Process] = []
    yield members
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.kill()


def test_six_steps_end_with_the_promises_kept(tmp_path: Path, family: list[psutil.Process]) -> None:
    process = start(tmp_path / "runs")
    family.append(psutil.Process(process.pid))
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("[6/6] done"):
            family += family[0].children(recursive=True)
    output = "".join(lines)
    assert process.wait(60) == 0, output
    for step in range(1, 7):
        assert f"[{step}/6] done in" in output
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["broken_promises"] == []
    settings = summary["five_settings"]
    assert settings["full_zero_shot"] > settings["ot_plug_in"] > settings["full_fine_tuned"]
    assert settings["ot_emulator"] > settings["ot_plug_in"]
    assert "plug-in closes" in output
    assert image.imread(run / "report/five_settings.png").std() > 0.01
    # Both models answered over HTTP, and the plug-in is the one that was promoted.
    assert "docs: 'A class definition' -> " in output
    assert f"{summary['plug_in']}: 'A class definition' -> " in output
    assert left_over(family) == []


def test_the_tuning_job_was_handed_no_more_than_it_may_see(tmp_path: Path, family: list[psutil.Process]) -> None:
    """Interrupted while the job runs: nothing stays behind, and what the job got lies open."""
    process = start(tmp_path / "runs", "tune.steps=4000")
    family.append(psutil.Process(process.pid))
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("tune:"):
            break
    family += family[0].children(recursive=True)
    assert any("jobs.tune" in member.cmdline() for member in family)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=90)
    assert process.returncode == 130, "".join(seen) + rest
    assert rest.rstrip().endswith("interrupted")
    assert left_over(family) == []
    (run,) = (tmp_path / "runs").iterdir()
    assert not list((run / "adapter").glob("*")), "an adapter that was not finished is not there"
    handed = sorted(path.name for path in (run / "tuning-job").iterdir())
    assert handed == ["owner.pem", "train.jsonl", "tune.yaml", "validation.jsonl"]
    assert "PRIVATE" not in (run / "tuning-job/owner.pem").read_text()


def test_a_taken_port_is_said_before_anything_is_done(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(tmp_path / "runs", f"port={port}")
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert "port=" in output and "Traceback" not in output
    assert not (tmp_path / "runs").exists()
