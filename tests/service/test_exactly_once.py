"""Controllers, and the database under them, are killed at random points: every job ends once, and its events tell how.

The jobs are processes in miniature that outlive whoever started them; one test runs the real command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ot_ray.artifacts import BundleManifest
from ot_ray.launch import ProcessLauncher
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.catalogue.records import Job
from serve.failures import DatabaseUnavailableError
from tests.fixtures.postgres import PostgresServer
from tests.service.controller_scene import Scene
from tests.service.job_records import RESUMED, ended_once

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_LIVES = Path(__file__).with_name("controller_lives.py")
_ROOT = Path(__file__).parents[2]
_PATIENCE_S = 600.0
_PLANS = (
    ({}, "succeeded"),
    ({"crash_at": 2}, "succeeded"),
    ({"error_at": 2}, "failed"),
    ({"adapter": "bad"}, "failed"),
    ({"step_s": 0.1}, "succeeded"),
)


@pytest.fixture
def bundle(released: BundleManifest) -> dict[str, str]:
    return {"model": released.model, "version": released.version, "bundle_id": released.bundle_id}


class Lives:
    """Controllers that live and die in a process of their own."""

    def __init__(self, scene: Scene, folder: Path, jobs: list[Job], seed: int, lives: int) -> None:
        config = {
            "url": scene.url,
            "store": str(scene.store.root),
            "processes": str(folder / "processes"),
            "bundle": scene.bundle,
            "adapters": str(scene.adapters),
            "settings": {"max_running": 3, "lease_s": 0.5, "attempts": 3},
            "jobs": [job.id for job in jobs],
            "seed": seed,
            "lives": lives,
        }
        path = folder / f"lives-{seed}.json"
        path.write_text(json.dumps(config))
        self._log = folder / f"lives-{seed}.log"
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(threads, "1"), "PYTHONPATH": str(_ROOT)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_LIVES), str(path)], env=environment, stdout=log, stderr=log, cwd=_ROOT
            )

    def wait(self) -> None:
        """Wait until the last controller has seen all jobs end."""
        try:
            assert self._process.wait(_PATIENCE_S) == 0, self._log.read_text()[-4000:]
        finally:
            self._process.kill()

    @property
    def over(self) -> bool:
        return self._process.poll() is not None


def _scene(url: str, store: LocalStore, bundle: dict[str, str], adapters: Path, tmp_path: Path) -> Scene:
    return Scene(url, store, ProcessLauncher(tmp_path / "processes"), bundle, adapters)


@pytest.fixture
def scene(
    any_database_url: str, store: LocalStore, bundle: dict[str, str], tuned_adapters: Path, tmp_path: Path
) -> Iterator[Scene]:
    made = _scene(any_database_url, store, bundle, tuned_adapters, tmp_path)
    yield made
    made.close()


def test_killed_controllers_end_every_job_once(scene: Scene, tmp_path: Path) -> None:
    """Two at once, each killed over and over; one job is cancelled, one paused and resumed, while it happens."""
    tenants = [scene.tenant("anna"), scene.tenant("bert", running_jobs=1)]
    jobs = [scene.job(tenants[number % 2], **plan) for number, (plan, _) in enumerate(_PLANS)]
    cancelled, paused = scene.job(tenants[0], hang_at=3), scene.job(tenants[0], hang_at=2)
    everything = [*jobs, cancelled, paused]
    lives = [Lives(scene, tmp_path, everything, seed, 8) for seed in (1, 2)]
    _until(lives, lambda: scene.look(cancelled).status == "running" and scene.look(cancelled).stage == "training")
    scene.catalogue.jobs.want(cancelled.tenant_id, cancelled.id, "cancel", expected=("running",))
    _until(lives, lambda: "Checkpoint created at step 2" in scene.told(paused))
    scene.catalogue.jobs.want(paused.tenant_id, paused.id, "pause", expected=("running",))
    _until(lives, lambda: scene.look(paused).status == "paused")
    scene.catalogue.jobs.move(paused.id, {"paused"}, "queued", event=RESUMED, wanted="run")
    for life in lives:
        life.wait()
    for job, (_, status) in zip(jobs, _PLANS, strict=True):
        _ended_once(scene, job, status)
    _ended_once(scene, cancelled, "cancelled")
    _ended_once(scene, paused, "succeeded")


def test_the_real_command_under_killed_controllers(
    sqlite_url: str, store: LocalStore, bundle: dict[str, str], tuned_adapters: Path, tmp_path: Path
) -> None:
    scene = _scene(sqlite_url, store, bundle, tuned_adapters, tmp_path)
    job = scene.job(scene.tenant("anna"), real=True)
    Lives(scene, tmp_path, [job], 4, 6).wait()
    done = scene.look(job)
    assert done.status == "succeeded", scene.told(job)
    assert scene.deliveries(job) == ["fine_tuning.job.succeeded"]
    metrics = [event.data for event in scene.events(job) if event.type == "metrics" and event.data]
    steps = [figures["step"] for figures in metrics]
    assert steps == sorted(set(steps)) and steps[-1] == metrics[-1]["total_steps"]
    assert all(figures["train_loss"] > 0 and 0 <= figures["train_mean_token_accuracy"] <= 1 for figures in metrics)
    assert "A progress report of the job could not be read." not in scene.told(job)
    checkpoints = scene.catalogue.checkpoints.list(job.tenant_id, job.id).items
    assert len(checkpoints) == 2 and checkpoints[0].step_number == steps[-1]
    mine = {record.model_id for record in scene.served(job)}
    assert mine == {done.fine_tuned_model, *(item.fine_tuned_model_checkpoint for item in checkpoints)}
    (results,) = done.result_files
    assert scene.store.read(f"files/{job.tenant_id}/{results}").decode().count("\n") == len(steps) + 1
    scene.close()


def test_a_killed_database_loses_nothing(
    own_postgres: PostgresServer, store: LocalStore, bundle: dict[str, str], tuned_adapters: Path, tmp_path: Path
) -> None:
    """PostgreSQL is killed and started again under controllers that are killed too."""
    url = own_postgres.url(own_postgres.database())
    catalogue = Catalogue.open(url)
    catalogue.migrate()
    catalogue.close()
    scene = _scene(url, store, bundle, tuned_adapters, tmp_path)
    tenant = scene.tenant("anna")
    jobs = [scene.job(tenant, **plan) for plan, _ in _PLANS]
    draw, lives = random.Random(3), Lives(scene, tmp_path, jobs, 3, 6)
    for _ in range(4):
        time.sleep(0.3 + draw.random())
        own_postgres.restart()
    lives.wait()
    for job, (_, status) in zip(jobs, _PLANS, strict=True):
        _ended_once(scene, job, status)
    scene.close()


def test_a_replica_that_starts_waits_for_a_database_that_is_away(own_postgres: PostgresServer) -> None:
    url = own_postgres.url(own_postgres.database())
    own_postgres.kill()
    catalogue = Catalogue.open(url)
    with pytest.raises(DatabaseUnavailableError):
        catalogue.migrate()
    waits = threading.Thread(target=catalogue.migrate, args=(_PATIENCE_S,))
    waits.start()
    own_postgres.start()
    waits.join(_PATIENCE_S)
    assert not waits.is_alive() and catalogue.tenants.list() == []
    catalogue.close()


def _until(lives: list[Lives], condition: object) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        assert not all(life.over for life in lives), "the controllers ended before"
        time.sleep(0.02)


def _ended_once(scene: Scene, job: Job, status: str) -> None:
    ended_once(scene, job, status, models=3)
    # No process of it runs.
    for attempt in range(1, scene.look(job).attempt + 1):
        name = job.id if attempt == 1 else f"{job.id}-{attempt}"
        assert scene.launcher.status(name) in ("succeeded", "failed", "stopped")
