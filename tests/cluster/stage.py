"""Plays a scene, which is a program of its own with a Ray cluster of its own, and ends whatever it started."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Play = Callable[[str], dict[str, Any]]
"""Plays a scene of this name, and returns what it left in `result.json`."""


@contextmanager
def stage(module: str, folder: Path) -> Iterator[Play]:
    """Scenes are played by `python -m module NAME FOLDER`; whatever they started is dead afterwards."""
    # Ray's sockets lie below it, and their paths may have 107 characters.
    place = tempfile.mkdtemp(prefix="ot", dir="/tmp")

    def play(name: str) -> dict[str, Any]:
        with (folder / "output").open("w+") as output:
            scene = [sys.executable, "-m", module, name, str(folder)]
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = subprocess.run(
                    scene, cwd=ROOT, env=_environment(place), stdout=output, stderr=subprocess.STDOUT, timeout=900
                ).returncode
            output.seek(0)
            assert code == 0, f"the scene {'took too long' if code is None else 'failed'}:\n{output.read()}"
        return json.loads((folder / "result.json").read_text())

    try:
        yield play
    finally:
        _kill_everything_below(place)
        shutil.rmtree(place, ignore_errors=True)


def _environment(place: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": place,
        # A dead machine is noticed within seconds; a busy one still has ten for each answer.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


def _kill_everything_below(place: str) -> None:
    mark = f"RAY_TMPDIR={place}".encode()
    deadline = time.monotonic() + 30
    while pids := [pid for pid in _processes() if mark in _setting(pid)]:
        assert time.monotonic() < deadline, f"processes {pids} do not end"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _setting(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []
