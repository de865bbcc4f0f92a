"""A controller that is killed again and again: started as a process by test_exactly_once.py.

One process imports everything and forks a child for each life, before any library has made a thread."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ot_ray.launch import ProcessLauncher
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.failures import DatabaseUnavailableError
from tests.service.controller_scene import Scene

_PATIENCE_S = 500.0


def main(config: dict[str, Any]) -> None:
    """Live and die `lives` times, each after a random while, and then to the end of all jobs."""
    draw = random.Random(config["seed"])
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads stand before the fork")
    for _ in range(config["lives"]):
        child = _born(config)
        # From the middle of the first statement to several rounds.
        time.sleep(draw.choice((0.05, 0.2, 0.5)) * (0.5 + draw.random()))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    last = _born(config)
    _, status = os.waitpid(last, 0)
    raise SystemExit(os.waitstatus_to_exitcode(status))


def _born(config: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _live(config)
        os._exit(0)
    except BaseException:
        logging.exception("a life ended by itself")
        os._exit(1)


def _live(config: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    scene = Scene(
        config["url"],
        LocalStore(config["store"]),
        ProcessLauncher(config["processes"]),
        config["bundle"],
        Path(config["adapters"]),
    )
    controller = scene.controller(**config["settings"])
    # Under one name the lease lets all of them lead at once, so that nothing but compare-and-set keeps order.
    controller._holder = "all"
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            controller.tick()
            if _all_ended(scene.catalogue, config["jobs"]):
                controller.wait()
                return
        except DatabaseUnavailableError as error:
            logging.warning("%s", error)
        time.sleep(0.02)
    raise TimeoutError("the jobs did not end")


def _all_ended(catalogue: Catalogue, jobs: list[str]) -> bool:
    return all(catalogue.jobs.find(job_id).cleaned_at is not None for job_id in jobs)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(json.loads(Path(sys.argv[1]).read_text()))
