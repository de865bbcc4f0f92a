"""Make an emulator of a full model: split, distil on a group of workers, judge, publish a signed bundle.

What one night does, and in which order, is emulator/night.py's."""

from __future__ import annotations

from typing import Any

from jobs.command import config_file, run_command
from jobs.emulator.choosing import choose_on_worker
from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.night import run_night
from jobs.emulator.planned import show_plan
from jobs.emulator.worker import distill_on_worker
from ot_ray.launch import ray_cluster, run_workers

__all__ = ["MakeEmulatorConfig", "run"]


def run(config: MakeEmulatorConfig) -> dict[str, Any] | None:
    """Distil an emulator under Ray Train with DeepSpeed, and publish it as a bundle if it passes the gate.

    The same inputs do nothing the second time; a job that was cut off goes on where it was.
    """
    if config.plan:
        show_plan(config)
        return None

    def distil(payload: dict[str, Any], run_name: str) -> dict[str, Any]:
        with ray_cluster(config.address):
            return run_workers(distill_on_worker, payload, config.workers, run_name)

    def choose(payload: dict[str, Any], run_name: str) -> dict[str, Any]:
        with ray_cluster(config.address):
            return run_workers(choose_on_worker, payload, config.workers.model_copy(update={"count": 1}), run_name)

    return run_night(config, distil, choose)


if __name__ == "__main__":
    run_command("make_emulator", MakeEmulatorConfig, run, default_config=config_file("make_emulator.yaml"))
