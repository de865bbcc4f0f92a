"""Mistakes that show only while workers distil: a clear error, nothing published, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.conftest import Command, Ended

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def night(command: Command, scene: Path, **settings: object) -> Ended:
    values = {
        "model": {"name": "tiny", "source": str(scene / "full")},
        "version": "v1",
        "run": "r1",
        "data": {"source": str(scene / "train.jsonl"), "workers": 0, "passes": 100},
        "split": {"bottom": 1, "keep": 2, "top": 1},
        "sequence_length": 16,
        "training": {"steps": 4, "batch_size": 2, "lr": 1e-3},
        "workers": {"count": 1, "ray_storage": str(scene / "ray")},
        "store": str(scene / "owner"),
        "bundles": str(scene / "bundles"),
        **settings,
    }
    (scene / "night.yaml").write_text(json.dumps(values))
    return command("make_emulator", "--config", str(scene / "night.yaml"))


def error_of(ended: Ended) -> str:
    assert ended.code == 2, ended
    # Ray shows some lines of its own there.
    assert "published" not in ended.out
    (message,) = (text for text in ended.err.splitlines() if text.startswith("error: "))
    return message


def test_text_that_dries_up(command: Command, scene: Path) -> None:
    data = {"source": str(scene / "train.jsonl"), "workers": 0, "passes": 1}
    training = {"steps": 500, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 2}
    message = error_of(night(command, scene, data=data, training=training))
    assert "train.jsonl" in message and "data.passes" in message
    assert not (scene / "bundles").exists()
    # With more passes it goes on from where it was, and ends.
    assert list((scene / "owner/runs/r1/checkpoints").glob("step-*/commit.json"))


def test_a_loss_that_is_not_finite(command: Command, scene: Path) -> None:
    training = {"steps": 20, "batch_size": 2, "lr": 1e30, "grad_clip": 0, "checkpoint_every": 1, "keep_checkpoints": 1}
    message = error_of(night(command, scene, training=training))
    assert "became" in message and "at step" in message and "rank 0" in message
    assert "checkpoint" in message
    assert not (scene / "bundles").exists()
    assert list((scene / "owner/runs/r1/checkpoints").glob("step-*/commit.json"))


def test_too_few_workers_for_too_long(command: Command, scene: Path) -> None:
    workers = {"count": 2, "cpus": 400, "start_timeout_s": 3, "ray_storage": str(scene / "ray")}
    message = error_of(night(command, scene, workers=workers))
    assert "workers.count is 2" in message and "workers.start_timeout_s" in message
    assert not (scene / "bundles").exists()
    # Whoever comes next finds the lease free.
    assert list((scene / "owner/leases/tiny").glob("*/end.json"))
