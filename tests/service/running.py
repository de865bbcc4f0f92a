"""A running service: `python -m serve` on a Ray, with a database, a store, a released bundle and tenants with keys."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ot_ray.artifacts import Releases, publish_bundle
from ot_ray.store import LocalStore
from serve import admin
from tests.fixtures.s3 import free_port
from tests.http.tiny_service import BASE

T = TypeVar("T")
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Running:
    """Where a service answers, and where it keeps what."""

    url: str
    """As OpenAI's clients take it, ending in `/v1`."""
    database: str
    store: LocalStore
    log: Path

    def key(self, tenant: str, scopes: str = "files,jobs,inference,offsite") -> str:
        """The secret of a new key, made with the administrator's command."""
        said = administer(self.database, "key", "create", tenant, "--scopes", scopes)
        return next(word for word in said.split() if word.startswith("sk-ot-"))


def administer(database: str, *arguments: str) -> str:
    """What `python -m serve.admin` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert admin.main(["--database", database, *arguments]) == 0
    return said.getvalue()


def configured(
    folder: Path,
    checkpoint: Path,
    bundle: Path,
    public_key: Path,
    tenants: Sequence[str],
    database: str | None = None,
    **more: Any,
) -> tuple[Path, Running]:
    """The config file of a service with everything on, its bundle released and its tenants made, and where it will be.

    Args:
        database: URL of an empty one; None for a file of SQLite.
        more: settings over those for a tiny model; those of `jobs` one by one.
    """
    store, database, port = LocalStore(folder / "store"), database or f"sqlite:///{folder}/service.db", free_port()
    publish_bundle(store, bundle)
    Releases(store, BASE).release("1")
    administer(database, "migrate")
    for tenant in tenants:
        administer(database, "tenant", "create", tenant)
    jobs = {
        "public_key": str(public_key),
        "sequence_length": 64,
        "precision": "float32",
        "tick_s": 0.2,
        "learning_rate": 1e-3,
    }
    settings = {
        "model": {"name": BASE, "source": str(checkpoint)},
        "store": store.url,
        "database": {"url": database},
        "port": port,
        "refresh_s": 0.2,
        "webhooks": {"allow_http": True, "allow_private": True},
        **more,
        "jobs": {**jobs, **more.get("jobs", {})},
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file, Running(f"http://127.0.0.1:{port}/v1", database, store, folder / "serve.log")


def command_of(file: Path, address: str | None) -> list[str]:
    """What starts the service; on a Ray of its own where no address is given."""
    command = [sys.executable, "-m", "serve", "--config", str(file)]
    return command if address is None else [*command, "--address", address]


@contextmanager
def running_service(
    folder: Path, address: str, checkpoint: Path, bundle: Path, public_key: Path, tenants: Sequence[str], **more: Any
) -> Iterator[Running]:
    """A service with everything on, until the end of the block.

    Args:
        address: of the Ray that it runs on.
        more: settings over those for a tiny model.
    """
    file, running = configured(folder, checkpoint, bundle, public_key, tenants, **more)
    with running.log.open("wb") as output:
        process = subprocess.Popen(command_of(file, address), stdout=output, stderr=output, start_new_session=True)
    try:
        until(lambda: answers(process, running.url.removesuffix("/v1"), running.log))
        yield running
    finally:
        stop(process)


def answers(process: subprocess.Popen[bytes], root: str, log: Path) -> bool:
    assert process.poll() is None, log.read_text(errors="replace")[-3000:]
    try:
        urllib.request.urlopen(f"{root}/healthz", timeout=30).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(found: Callable[[], T], pause_s: float = 0.3) -> T:
    """What `found` returns, as soon as that is true of it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := found()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s; at last: {result!r}"
        time.sleep(pause_s)
    return result
