"""Replicas of gradient learning are killed under sessions that the server fits: every batch is fitted once."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from ot_ray.launch.cluster import ClusterAddress
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.catalogue.records import GradientSession
from serve.local import shutdown
from tests.cluster.deployed import Deployed, until
from tests.http.tiny_service import BASE, byte_model, byte_tokenizer
from tests.service.gradient_scene import Scene, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BATCHES = 24


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return byte_model(depth=2).requires_grad_(False)


@pytest.fixture(scope="module")
def scene(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("gradients")
    catalogue = Catalogue.open(f"sqlite:///{folder}/service.db")
    catalogue.migrate()
    yield Scene(catalogue, LocalStore(folder / "store"), model)
    catalogue.close()


@pytest.fixture(scope="module")
def service(local_ray: ClusterAddress, scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Two replicas of gradient learning, with as much of a service as there has to be."""
    folder = tmp_path_factory.mktemp("service")
    scene.model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    settings = {
        "model": {"name": BASE, "source": str(folder / "base")},
        "store": scene.store.url,
        "database": {"url": str(scene.catalogue._database.engine.url)},
        "jobs": {"launcher": "processes", "folder": str(folder / "jobs"), "sequence_length": 64},
        "num_cpus": 0.1,
        # On a busy machine, one that lives may be taken for lost.
        "gradients": {"replicas": 2, "num_cpus": 0.1, "lease_s": 3, "poll_s": 0.05, "attempts": 1000},
    }
    deployed = Deployed(folder, local_ray, settings)
    deployed.deploy()
    deployed.wait(Gradients=2)
    yield deployed
    shutdown()


def ask(scene: Scene) -> list[GradientSession]:
    """Two tenants' sessions, each with a queue of batches."""
    # Of plain steps, which make no more of rounding than there is.
    fitting = {"optimizer": "sgd", "lr": 0.01}
    sessions = [scene.session(f"tenant{i}", fit="server", interval=2, fitting=fitting) for i in range(2)]
    for batch in range(BATCHES):
        for seed, session in enumerate(sessions):
            scene.forward_backward(session, rows_of(100 * seed + batch, 6, 9))
    return sessions


def test_every_batch_is_fitted_once_whatever_is_killed(
    service: Deployed, scene: Scene, model: PreTrainedModel, tmp_path: Path
) -> None:
    draw, sessions = random.Random(5), ask(scene)

    def collected() -> int:
        return min(scene.catalogue.gradient_sessions.find(session.id).version for session in sessions)

    for after, victims in ((3, 1), (9, 1), (15, 2)):
        until(lambda after=after: collected() >= after)
        there = until(lambda: [one.pid for one in service.replicas("Gradients").values() if one.pid is not None])
        for pid in draw.sample(sorted(there), min(victims, len(there))):
            # Serve may name one that is gone already.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    until(lambda: collected() == BATCHES)

    undisturbed = Catalogue.open(f"sqlite:///{tmp_path}/quiet.db")
    undisturbed.migrate()
    quiet = Scene(undisturbed, LocalStore(tmp_path / "store"), model)
    alike, worker = ask(quiet), quiet.worker()
    while worker.round():
        pass
    for session, other in zip(sessions, alike, strict=True):
        results = [scene.result(session, number) for number in range(BATCHES)]
        assert [result["fits"] for result in results] == [(number + 1) // 2 for number in range(BATCHES)]
        found, wanted = scene.present(session).tensors, quiet.present(other).tensors
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-6)
    undisturbed.close()
