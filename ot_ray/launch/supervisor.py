"""Runs one job of `ProcessLauncher` beside it: starts the command once, watches, stops it, writes how it ended.

A script of the standard library alone, started by its path, so that a launcher that is killed takes no job along."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_POLL_S = 0.05
_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1
# A look at a job holds its lock for a moment.
_LOCK_TRIES, _LOCK_PAUSE_S = 20, 0.01
_MOST_LOG_BYTES = 64 * 2**20


def main(folder: Path) -> None:
    """Run the job whose folder this is, unless another supervisor does or did."""
    # Taken before the fork: whoever waits for this process to go finds the job watched, or done.
    lock = _lock(folder / "lock")
    if lock is None:
        return
    if os.fork():
        os._exit(0)
    os.setsid()
    try:
        _watch(folder)
    except Exception as error:
        _end(folder, "failed", f"the job could not be watched: {type(error).__name__}")
        raise


def _lock(path: Path) -> int | None:
    """The open file that holds a job's lock; None if another supervisor has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return lock
    return None


def _watch(folder: Path) -> None:
    if (folder / "exit.json").exists():
        return
    if (folder / "started").exists():
        _end(folder, "failed", "the machine or the process that watched the job went away")
        return
    if (folder / "stop").exists():
        _end(folder, "stopped", "stopped before it started")
        return
    with (folder / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    _run(folder, json.loads((folder / "spec.json").read_text(encoding="utf-8")))


def _run(folder: Path, spec: dict[str, Any]) -> None:
    _write(folder / "started", "")
    try:
        child = subprocess.Popen(
            spec["command"],
            cwd=folder / "work",
            env=spec["environment"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    except OSError as error:
        _end(folder, "failed", f"the command could not be started: {error.strerror}")
        return
    try:
        _follow(folder, spec, child)
    except BaseException:
        _kill(child)
        raise


def _follow(folder: Path, spec: dict[str, Any], child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + spec["time_limit_s"] if spec["time_limit_s"] is not None else None
    while child.poll() is None:
        _cut_log()
        if (folder / "stop").exists():
            _kill(child)
            _end(folder, "stopped", "stopped on request")
            return
        if deadline is not None and time.monotonic() > deadline:
            _kill(child)
            _end(folder, "failed", f"stopped after its time limit of {spec['time_limit_s']:g} s")
            return
        time.sleep(_POLL_S)
    # What it started and left behind ends with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    if child.returncode == 0:
        _end(folder, "succeeded", "")
    elif child.returncode < 0:
        _end(folder, "failed", f"killed by signal {-child.returncode}")
    else:
        _end(folder, "failed", f"the command ended with exit status {child.returncode}")


def _cut_log() -> None:
    # The job writes to the same open file at its end, wherever that is.
    if os.fstat(1).st_size > _MOST_LOG_BYTES:
        os.ftruncate(1, 0)
        os.write(1, b"[what was here is left out: the log was too long]\n")


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(folder: Path, status: str, message: str) -> None:
    # What the job was given may hold credentials.
    shutil.rmtree(folder / "work", ignore_errors=True)
    _write(folder / "exit.json", json.dumps({"status": status, "message": message}))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
