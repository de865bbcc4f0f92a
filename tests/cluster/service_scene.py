"""A machine that runs the whole service as a platform does: whatever ends is started again, and anything may be killed.

Nothing here is part of the test's own process; which jobs run, and what must be true of them, is the tests'."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.failures import DatabaseUnavailableError
from tests.fixtures.postgres import PostgresServer
from tests.fixtures.s3 import free_port
from tests.service.running import Running, command_of

PATIENCE_S = 600.0
_ROOT = Path(__file__).parents[2]
_SETTINGS = {
    "PYTHONPATH": str(_ROOT),
    "OMP_NUM_THREADS": "1",
    # Ray would have its workers wait for everybody else on the machine, and gives a busy one little time to start.
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "240",
}
# What the command of a tuning job has in its command line, from the moment when it starts.
_JOB = b"jobs.tune"
# Processes that Ray Serve gives a title of their own.
REPLICAS = {
    "controller": b"ray::ServeReplica:offsite-tuning:Controller",
    "engine": b"ray::ServeReplica:offsite-tuning:Engine",
    "api": b"ray::ServeReplica:offsite-tuning:Api",
    "proxy": b"ray::ProxyActor",
    "serve": b"ray::ServeController",
}
VICTIMS = (*REPLICAS, "service", "ray", "database")


class Supervised:
    """A process that is started again whenever it has ended."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, environment, log
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def keep(self) -> bool:
        """Start it, if it does not run; whether it had to be started."""
        if (self._process is not None and self._process.poll() is None) or time.monotonic() < self._started_at + 1:
            return False
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        return True

    def reap(self) -> None:
        if self._process is not None:
            self._process.wait(PATIENCE_S)


class Platform:
    """A Ray, the service on it, and the database below.

    Args:
        place: an empty folder with a short path, for Ray, by which all processes are known.
        file: the service's settings.
        own_ray: whether the service brings its Ray; otherwise that is started beside it.
    """

    def __init__(self, place: str, file: Path, running: Running, database: PostgresServer, own_ray: bool) -> None:
        self._mark, self._root = f"RAY_TMPDIR={place}".encode(), running.url.removesuffix("/v1")
        self._log, self._database = running.log, database
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment = {**inherited, **_SETTINGS, "RAY_TMPDIR": place}
        self._kept: dict[str, Supervised] = {}
        address = None
        if not own_ray:
            address = f"127.0.0.1:{free_port()}"
            self._kept["ray"] = Supervised(_ray(address), environment, file.with_name("ray.log"))
        self._kept["service"] = Supervised(command_of(file, address), environment, running.log)
        self._began, self._story = time.monotonic(), file.with_name("story")

    def tell(self, line: str) -> None:
        """Note what happened, for whoever reads a failure."""
        with self._story.open("a") as story:
            story.write(f"{time.monotonic() - self._began:6.1f} s: {line}\n")

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Keep everything running until a condition holds; one that the database cannot answer does not."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.keep()
            with contextlib.suppress(DatabaseUnavailableError):
                if condition():
                    return
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g} s\n{self}"
            time.sleep(0.1)

    def pause(self, seconds: float) -> None:
        """Let things go on for a while."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, "a pause")

    def keep(self) -> None:
        """Start again what has ended."""
        for name, process in self._kept.items():
            if process.keep():
                self.tell(f"{name} started")

    def kill(self, victim: str, draw: random.Random) -> None:
        """Kill one of VICTIMS as soon as it is there."""
        if victim == "database":
            self._database.kill()
            self.tell("killed the database")
            self.pause(draw.uniform(0, 4))
            self._database.start()
            self.tell("the database runs again")
            return
        found: list[int] = []
        self.until(lambda: found.extend(self._pids(victim)) or found, f"{victim} is there")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.tell(f"killed {victim}: {len(found)} processes")

    def jobs(self) -> list[int]:
        """Processes of tuning jobs."""
        return [pid for pid, line in self._processes() if _JOB in line]

    def stop(self) -> None:
        """Kill everything, and wait until it is gone."""
        deadline = time.monotonic() + PATIENCE_S
        while pids := [pid for pid, _ in self._processes()]:
            assert time.monotonic() < deadline, f"processes {pids} do not end"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for process in self._kept.values():
            process.reap()

    def __str__(self) -> str:
        log = self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""
        return f"{self._story.read_text()}the service's log ends:\n{log}"

    def _pids(self, victim: str) -> list[int]:
        pid = self._kept["service"].pid
        if victim == "service":
            return [pid] if pid is not None else []
        if victim in REPLICAS:
            return [pid for pid, line in self._processes() if line.startswith(REPLICAS[victim])]
        # All of Ray at once, what watches over jobs for it too; the jobs' own processes are left to end by themselves.
        ray = [other for other, line in self._processes() if other != pid and _JOB not in line]
        return ray if any(b"gcs_server" in line for _, line in self._processes()) else []

    def _processes(self) -> Iterator[tuple[int, bytes]]:
        """Living processes of this platform with their command lines."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self._mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name), (entry / "cmdline").read_bytes()


def _ray(address: str) -> list[str]:
    """What starts the head of a Ray that takes jobs, beside any other Ray of the machine."""
    host, _, port = address.partition(":")
    options = {
        "node-ip-address": host,
        "port": port,
        "dashboard-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": 4,
        "object-store-memory": 100_000_000,
        "include-log-monitor": False,
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--no-monitor"]
    return [*ray, "--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]
