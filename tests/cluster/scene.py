"""One fault on a real cluster of several Ray nodes, as a program of its own, so that no Ray state outlives it:
`python -m tests.cluster.scene NAME FOLDER`. The program owns the cluster; the run's driver is another process.

What the driver saw lies in the folder afterwards: `figures.jsonl`, `attempts`, and `result.json`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PATIENCE_S = 280.0
"""For each part of a scene; together they take less than test_faults.py waits."""


def kill_worker(folder: Path) -> None:
    """The last rank is killed at step 5, once."""
    cluster = _cluster(2)
    _end_well(_driver(cluster, folder, {"hold": {"1": 5}, "die": True}, {"count": 2, "max_failures": 1}))
    cluster.shutdown()


def lose_machine(folder: Path) -> None:
    """Two workers on two machines; one machine vanishes at step 4 and another comes at step 8."""
    cluster = _cluster(0)
    _, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    group = {"count": [1, 2], "max_failures": 0, "resize_interval_s": 1}
    driver = _driver(cluster, folder, {"hold": {"1": 4, "2": 8}}, group)
    _wait_for(driver, lambda: _reached(folder, attempt=1, step=4))
    cluster.remove_node(second, allow_graceful=False)
    _wait_for(driver, lambda: _reached(folder, attempt=2, step=8))
    cluster.add_node(num_cpus=1)
    _end_well(driver)
    cluster.shutdown()


def kill_driver(folder: Path) -> None:
    """The process that holds the run is killed at step 6, and the same run is started again."""
    cluster = _cluster(2)
    payload, group = {"hold": {"1": 6}}, {"count": 2, "max_failures": 0}
    driver = _driver(cluster, folder, payload, group)
    _wait_for(driver, lambda: _reached(folder, attempt=1, step=6))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _end_well(_driver(cluster, folder, payload, group))
    cluster.shutdown()


def drive(folder: Path, address: str, payload: str, group: str) -> None:
    """Be the driver of a run."""
    from ot_ray.launch import WorkerGroup, ray_cluster, run_workers
    from tests.cluster.work import work

    told: list[str] = []
    workers = WorkerGroup.model_validate({**json.loads(group), "ray_storage": str(folder / "ray")})
    with ray_cluster(address, show_logs=False):
        result = run_workers(work, {"folder": str(folder), **json.loads(payload)}, workers, "scene", told.append)
    # On a busy machine the run may also tell that it waits for room.
    restarts = [text for text in told if "starting again" in text]
    (folder / "result.json").write_text(json.dumps({**result, "restarts": restarts}))


def _cluster(head_cpus: int) -> Any:
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})


def _driver(cluster: Any, folder: Path, payload: dict[str, Any], group: dict[str, Any]) -> subprocess.Popen[bytes]:
    arguments = ["drive", str(folder), cluster.address, json.dumps(payload), json.dumps(group)]
    return subprocess.Popen([sys.executable, "-m", "tests.cluster.scene", *arguments])


def _reached(folder: Path, attempt: int, step: int) -> bool:
    path = folder / "figures.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(line["attempt"] == attempt and line["step"] == step for line in map(json.loads, lines))


def _wait_for(driver: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if driver.poll() is not None:
            sys.exit(f"the driver ended too early, with {driver.returncode}")
        if time.monotonic() > deadline:
            sys.exit("the run did not come to where the fault belongs")
        time.sleep(0.1)


def _end_well(driver: subprocess.Popen[bytes]) -> None:
    try:
        code = driver.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        sys.exit(f"the driver has not ended within {_PATIENCE_S:.0f} s")
    if code != 0:
        sys.exit(f"the driver ended with {code}")


SCENES = {scene.__name__: scene for scene in (kill_worker, lose_machine, kill_driver)}

if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(Path(sys.argv[2]), *sys.argv[3:])
    else:
        SCENES[sys.argv[1]](Path(sys.argv[2]))
