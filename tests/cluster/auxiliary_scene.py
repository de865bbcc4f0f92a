"""Auxiliary workers on a cluster whose machines come and go: `python -m tests.cluster.auxiliary_scene NAME FOLDER`.

What came of the fits lies in the folder afterwards, in `outcome.pt` and `result.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ot_ray.cola import Auxiliary, AuxiliaryConfig, FitConfig, Pair, Site, make_fitter
from ot_ray.errors import LaunchError
from ot_ray.launch import AuxiliaryPool, AuxiliaryWorkers, ray_cluster
from tests.launch.customers import FITTINGS, auxiliaries, base_pass, outcome, run

LOST_AT = 4
STALENESS = 1


class Losing:
    """A pool whose machine is lost after a batch was handed over; then another comes."""

    def __init__(self, pool: AuxiliaryPool, cluster: Any, node: Any) -> None:
        self._pool, self._cluster, self.node = pool, cluster, node
        self.taken, self.states, self.load, self.close = pool.taken, pool.states, pool.load, pool.close

    def submit(self, number: int, pairs: Mapping[str, Mapping[str, Pair] | None], flush: bool = False) -> None:
        self._pool.submit(number, pairs, flush)
        if number == LOST_AT:
            self.node = _another(self._cluster, self.node)


def _another(cluster: Any, node: Any) -> Any:
    """A machine is lost; then another comes."""
    cluster.remove_node(node, allow_graceful=False)
    return cluster.add_node(num_cpus=2, resources={"auxiliary": 1})


def lose_machine(folder: Path) -> None:
    """Both workers sit on the one machine with the label, which is lost; the base's machine has room, but no label."""
    from ray.cluster_utils import Cluster

    torch.set_num_threads(1)
    seen: dict[str, Any] = {"told": []}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    node = cluster.add_node(num_cpus=2, resources={"auxiliary": 1})
    base, workers = base_pass(), AuxiliaryWorkers(count=2, resources={"auxiliary": 0.001}, snapshot_every=2)
    seen["alone"] = _message(lambda: AuxiliaryPool(auxiliaries(base), FITTINGS, workers))
    with ray_cluster(cluster.address, show_logs=False):
        with AuxiliaryPool(auxiliaries(base), FITTINGS, workers, seen["told"].append) as pool:
            seen["before"] = _machines(pool)
            losing = Losing(pool, cluster, node)
            result, mode = run(base, losing, STALENESS)
            seen["after"] = _machines(pool)
            torch.save(outcome(result, mode, pool), folder / "outcome.pt")
        seen["large"] = _large_answer_is_lost(cluster, losing.node, workers)
        labelled = {"few": {"auxiliary": 2.0}, "none": {"fitter": 1.0}}
        for name, resources in labelled.items():
            few = AuxiliaryWorkers(resources=resources, start_timeout_s=1)
            seen[name] = _message(lambda few=few: AuxiliaryPool(auxiliaries(base), FITTINGS, few))
        seen["lost"] = node.node_id
    (folder / "result.json").write_text(json.dumps(seen))
    cluster.shutdown()


def _large_answer_is_lost(cluster: Any, node: Any, workers: AuxiliaryWorkers) -> bool:
    """Whether an answer is the right one that had been given, but was still on the machine that is lost."""
    import ray

    auxiliary = Auxiliary({"map": Site("map", "linear", 400, 300)}, AuxiliaryConfig(kind="linear"))
    pair = Pair(torch.randn(7, 400), torch.randn(7, 300))
    with AuxiliaryPool({"ann": auxiliary}, FitConfig(), workers) as pool:
        pool.submit(0, {"ann": {"map": pair}})
        ray.wait(list(pool._seats[0]._answers.values()), fetch_local=False)
        _another(cluster, node)
        found = pool.taken(0)["ann"].tensors
    make_fitter(auxiliary, FitConfig()).collect({"map": pair})
    return found is not None and torch.equal(found["map.linear.weight"], auxiliary.tensors["map.linear.weight"])


def _machines(pool: AuxiliaryPool) -> list[str]:
    """Where the workers are."""
    import ray

    def machine(worker: Any) -> str:
        return ray.get_runtime_context().get_node_id()

    return [ray.get(seat._actor.__ray_call__.remote(machine)) for seat in pool._seats]


def _message(call: Any) -> str:
    try:
        call()
    except LaunchError as error:
        return str(error)
    return "nothing was raised"


if __name__ == "__main__":
    {"lose_machine": lose_machine}[sys.argv[1]](Path(sys.argv[2]))
