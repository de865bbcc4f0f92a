"""Connecting to a Ray cluster, or starting one on this machine that leaves nothing behind."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ot_ray.errors import LaunchError, MissingDependencyError

_ADDRESS = re.compile(r"(?:ray://)?(?P<host>[^/:\s]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})")
_CONNECT_SECONDS = 5.0
_BUSY_SECONDS = 60.0
_OOM_RETRIES = "3"


@dataclass(frozen=True)
class ClusterAddress:
    """Where a cluster answers."""

    ray: str
    """For `ray.init(address=...)`."""
    dashboard: str | None
    """For the Jobs API, `http://host:port`; None where the cluster has no dashboard."""


@contextmanager
def ray_cluster(
    address: str | None = None, num_cpus: int | None = None, dashboard: bool = True, show_logs: bool = True
) -> Iterator[ClusterAddress]:
    """Be connected to a Ray cluster for a while.

    Args:
        address: an existing cluster, `host:port`, `ray://host:port` or `auto`; unset, the one this process
            already belongs to (a Ray job, or `RAY_ADDRESS`), or else a new one on this machine, which is
            stopped at the end. A new one's dashboard listens on the loopback interface, and it asks for a
            token of its own, unless `RAY_AUTH_MODE` says otherwise.
        num_cpus: logical CPUs of a new cluster.
        dashboard: whether a new cluster has one; the Jobs API is part of it.
        show_logs: print here what tasks and actors print there.

    Raises:
        LaunchError: Ray could not be reached or started, or this process belongs to another cluster already.
        MissingDependencyError: Ray is not installed.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray would try a task that does not fit into a machine's memory for ever. The process that submits it counts.
    os.environ.setdefault("RAY_task_oom_retries", _OOM_RETRIES)
    if address is None:
        _choose_authentication()
        # A cluster of this one machine has no nodes to be preempted, and its watcher prints errors.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        import ray
    except ImportError:
        raise MissingDependencyError(
            "Ray is not installed; install the platform's part: pip install 'ot_ray[platform]'"
        ) from None

    if address is not None:
        _require_listener(address)
    if ray.is_initialized():
        current = _address()
        _require_same(address, current.ray)
        yield current
        return
    # Options of a cluster that is being started are refused for one that exists.
    new = {} if address else {"num_cpus": num_cpus, "include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
    try:
        with _free_agent_port():
            _init(address, log_to_driver=show_logs, **new)
    except Exception as error:  # of a node that does not come up in time, Ray says so in a bare one
        target = f"connect to Ray at {address}" if address else "start a local Ray"
        cause = f" ({_said(error.__cause__)})" if error.__cause__ is not None else ""
        raise LaunchError(f"could not {target}: {_said(error)}{cause}; check the address and `ray status`") from None
    try:
        yield _address()
    finally:
        ray.shutdown()


def _init(address: str | None, **options: Any) -> None:
    import ray

    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            ray.init(address=address or "local", logging_level=logging.ERROR, **options)
        except ConnectionError as error:
            # Somebody listens there: a cluster with much to do may miss Ray's own, short deadlines.
            if address is None or time.monotonic() > deadline or _final(address, error):
                raise
            time.sleep(1.0)
        else:
            return


def _final(address: str, error: ConnectionError) -> bool:
    """Whether trying again would meet the same: a wrong token, or no cluster, or several, to find by `auto`."""
    if error.__cause__ is None:
        return address == "auto"
    # Ray puts the stack of what it met into the text.
    return "AuthenticationError" in str(error.__cause__)


def _said(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join((text.splitlines()[-1] if "Traceback (most recent call last)" in text else text).split())


def _require_listener(address: str) -> None:
    # Ray itself keeps trying an address where nobody listens for minutes.
    if address == "auto":
        return
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise LaunchError(f"address is {address!r}; use host:port, ray://host:port or auto")
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise LaunchError(
            f"address is {address!r}, where no Ray cluster answers ({error}); check it with `ray status`"
        ) from None


def _require_same(asked: str | None, current: str) -> None:
    if asked is None or asked == "auto":
        return
    from ray.util.client import ray as client

    if asked.startswith("ray://"):
        # A client's port says nothing of the cluster behind it.
        known = f"ray://{getattr(client.worker, '_conn_str', '')}" if client.is_connected() else None
    else:
        known = current
    if known is None or _endpoint(asked) != _endpoint(known):
        raise LaunchError(
            f"address is {asked!r}, but this process belongs to the Ray cluster at {current} already; leave the "
            "address unset to use that one, or start another process"
        )


def _endpoint(address: str) -> tuple[str, int]:
    from ray.util import get_node_ip_address

    match = _ADDRESS.fullmatch(address)
    assert match is not None, address
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(match["host"])
        # This machine has several names; a port on it belongs to one cluster.
        return "here" if host.startswith("127.") or host == get_node_ip_address() else host, int(match["port"])
    return match["host"].strip("[]"), int(match["port"])


@contextmanager
def _free_agent_port() -> Iterator[None]:
    # The agent that starts jobs asks for one fixed port, which `ray.init` has no option for. A second Ray on
    # one machine would go without it, and take no jobs.
    from ray._private import parameter

    original = parameter.RayParams
    parameter.RayParams = functools.partial(original, dashboard_agent_listen_port=0)  # type: ignore[misc]
    try:
        yield
    finally:
        parameter.RayParams = original


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


def own_cluster() -> ClusterAddress:
    """Addresses of the cluster that this process, a worker perhaps, belongs to.

    Raises:
        LaunchError: it belongs to none.
    """
    import ray
    from ray.dashboard.utils import ray_address_to_api_server_url

    if not ray.is_initialized():
        raise LaunchError("this process belongs to no Ray cluster; connect to one first")
    address = ray.get_runtime_context().gcs_address
    try:
        url = ray_address_to_api_server_url(address)
    except ValueError:
        url = ""
    return ClusterAddress(address, url if url.removeprefix("http://") else None)
