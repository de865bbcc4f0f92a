"""Isolated jobs as processes of this machine, for a service on one computer without Ray.

Each is watched by a supervisor of its own (supervisor.py), so that jobs outlive the process that submitted them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ot_ray.errors import AlreadyExistsError, LaunchError, NotFoundError
from ot_ray.launch.jobs import DONE, JobSpec

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# In supervisor.py's words.
_EXIT = re.compile(r"the command ended with exit status ([0-9]+)|killed by signal ([0-9]+)")
_POLL_S = 0.05
_STARTS = 6  # of a supervisor, in one look at a job; the pauses between them double
_LEFT_BEHIND_S = 24 * 3600.0
# What a command needs of its surroundings; all else, secrets among it, stays outside.
_PASSED = re.compile(
    r"PATH|HOME|LANG|LC_[A-Z]+|TZ|TMPDIR|PYTHONPATH|VIRTUAL_ENV|LD_LIBRARY_PATH|CUDA_HOME|CUDA_VISIBLE_DEVICES"
    r"|HF_HUB_OFFLINE|TOKENIZERS_PARALLELISM"
)


class ProcessLauncher:
    """A `JobLauncher` whose jobs are processes of this machine; every launcher of one folder sees the same jobs.

    Processes share the user: a job could read what this user can. CPUs are a number of threads that is recommended
    to the job, memory is not limited, and a job without GPUs is shown none.

    Args:
        folder: where jobs, their output and how they ended are kept; it is made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def submit(self, spec: JobSpec) -> str:
        """See `JobLauncher`. Raises AlreadyExistsError for an id that was used; that job is then sure to start."""
        if not _JOB_ID.fullmatch(spec.job_id):
            raise LaunchError(f"job_id is {spec.job_id[:200]!r}; use up to 128 letters, digits, dots, dashes")
        target = self.folder / spec.job_id
        # A job that is already there is told apart before its files are copied.
        if not target.exists():
            prepared = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            try:
                _fill(prepared, spec)
                # A folder is taken over by nobody: of several submissions of an id, one renames.
                os.rename(prepared, target)
            except OSError as error:
                shutil.rmtree(prepared, ignore_errors=True)
                if not target.exists():
                    raise LaunchError(
                        f"job {spec.job_id} was not accepted: {error.strerror}: {error.filename}"
                    ) from None
            else:
                self._supervise(target)
                return spec.job_id
        self._look(spec.job_id)
        raise AlreadyExistsError(f"job {spec.job_id} was submitted before; use another id")

    def status(self, job_id: str) -> str:
        """See `JobLauncher`. A job whose submitter was killed before it could start is started."""
        return self._look(job_id)["status"]

    def message(self, job_id: str) -> str:
        return self._look(job_id)["message"]

    def found_no_room(self, job_id: str) -> bool:
        """See `JobLauncher`. Here every job begins at once."""
        self._place(job_id)
        return False

    def exit_status(self, job_id: str) -> int | None:
        known = self._look(job_id)
        if known["status"] == "succeeded":
            return 0
        found = _EXIT.fullmatch(known["message"])
        return found and (int(found[1]) if found[1] else -int(found[2]))

    async def logs(self, job_id: str) -> AsyncIterator[str]:
        log = self._place(job_id) / "log"
        at = 0
        while True:
            done = self.status(job_id) in DONE
            if log.exists():
                with log.open("rb") as file:
                    # A log that grew too long has begun anew.
                    at = at if at <= os.fstat(file.fileno()).st_size else 0
                    file.seek(at)
                    piece = file.read()
                at += len(piece)
                if piece:
                    yield piece.decode(errors="replace")
            if done:
                return
            await asyncio.sleep(_POLL_S)

    def stop(self, job_id: str, timeout_s: float = 60.0) -> None:
        (self._place(job_id) / "stop").touch()
        deadline = time.monotonic() + timeout_s
        while self.status(job_id) not in DONE:
            if time.monotonic() > deadline:
                raise LaunchError(f"job {job_id} did not stop within {timeout_s:.0f} s; look at {self.folder / job_id}")
            time.sleep(_POLL_S)

    def forget(self, job_id: str) -> None:
        """See `JobLauncher`. Raises LaunchError for a job that is not done."""
        folder = self._place(job_id)
        if self.status(job_id) not in DONE:
            raise LaunchError(f"job {job_id} is not done; stop it first")
        for path in folder.iterdir():
            if path.name == "work":
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "exit.json":
                path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what submissions that were killed have left behind."""
        for path in self.folder.glob(".new-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _LEFT_BEHIND_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _place(self, job_id: str) -> Path:
        folder = self.folder / job_id
        if not _JOB_ID.fullmatch(job_id) or not folder.is_dir():
            raise NotFoundError(f"job {job_id[:200]} is unknown to {self.folder}")
        return folder

    def _look(self, job_id: str) -> dict[str, Any]:
        folder = self._place(job_id)
        for start in range(_STARTS + 1):
            if (ended := _ended(folder)) is not None:
                return ended
            if _held(folder):
                started = (folder / "started").exists()
                return {"status": "running" if started else "pending", "message": ""}
            # Nobody watches it, and it may have ended a moment ago.
            if (ended := _ended(folder)) is not None:
                return ended
            if start < _STARTS:
                self._supervise(folder)
                time.sleep(_POLL_S * 2**start)
        raise LaunchError(f"nothing can watch job {job_id}: its supervisors end at once; look at {folder}")

    @staticmethod
    def _supervise(folder: Path) -> None:
        # The supervisor leaves at once a child behind that belongs to nobody; this call waits for no job.
        process = subprocess.run(
            [sys.executable, "-I", "-S", str(_SUPERVISOR), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=False,
        )
        if process.returncode:
            raise LaunchError(f"the supervisor of {folder.name} could not start: exit status {process.returncode}")


def _fill(folder: Path, spec: JobSpec) -> None:
    if spec.working_dir is not None:
        shutil.copytree(spec.working_dir, folder / "work")
    else:
        (folder / "work").mkdir()
    wanted = {
        "command": spec.command,
        "environment": _environment(spec),
        "time_limit_s": spec.time_limit_s,
    }
    with (folder / "spec.json").open("w", encoding="utf-8") as file:
        json.dump(wanted, file)
        file.flush()
        # What a job is must be on the disk before its name is.
        os.fsync(file.fileno())


def _environment(spec: JobSpec) -> Mapping[str, str]:
    passed = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
    # `python` of a command is the Python that runs the service.
    passed["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), passed.get("PATH", os.defpath)])
    passed["OMP_NUM_THREADS"] = str(max(1, math.ceil(spec.cpus)))
    if spec.gpus == 0:
        passed["CUDA_VISIBLE_DEVICES"] = ""
    return {**passed, **spec.environment}


def _ended(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "exit.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _held(folder: Path) -> bool:
    """Whether a supervisor holds the job."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
