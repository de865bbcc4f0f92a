"""Connecting to a Ray cluster, or starting one on this machine that leaves nothing behind."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ot_ray.errors import LaunchError


@dataclass(frozen=True)
class ClusterAddress:
    """Where a cluster answers."""

    ray: str
    """For `ray.init(address=...)`."""
    dashboard: str | None
    """For the Jobs API, `http://host:port`; None where the cluster has no dashboard."""


@contextmanager
def ray_cluster(
    address: str | None = None, num_cpus: int | None = None, dashboard: bool = True
) -> Iterator[ClusterAddress]:
    """Be connected to a Ray cluster for a while.

    Args:
        address: an existing cluster; unset, the one this process already belongs to (a Ray job, or
            `RAY_ADDRESS`), or else a new one on this machine, which is stopped at the end. A new one
            listens on the loopback interface and asks for a token of its own, unless `RAY_AUTH_MODE` says
            otherwise.
        num_cpus: logical CPUs of a new cluster.

    Raises:
        LaunchError: Ray could not be reached or started.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _choose_authentication()
        # A cluster of this one machine has no nodes to be preempted, and its watcher prints errors.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    if ray.is_initialized():
        yield _address()
        return
    try:
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            # Options of a cluster that is being started are refused for one that exists.
            **(
                {} if address else {"num_cpus": num_cpus, "include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
            ),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        target = f"connect to Ray at {address}" if address else "start a local Ray"
        raise LaunchError(f"could not {target}: {str(error).strip()}; check the address and `ray status`") from None
    try:
        yield _address()
    finally:
        ray.shutdown()


def _choose_authentication() -> None:
    # Ray reads its mode when it is imported, so that it is too late once somebody has done so. Without a
    # choice it would write a token into the home folder; this one lives as long as the process.
    if "ray" in sys.modules:
        return
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _address() -> ClusterAddress:
    import ray

    context = ray.get_runtime_context()
    worker = ray._private.worker.global_worker  # type: ignore[attr-defined]
    url = worker.node.webui_url if worker.node is not None else None
    return ClusterAddress(context.gcs_address, f"http://{url}" if url else None)
