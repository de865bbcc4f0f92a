"""Starts, attends and stops the service on the Ray that this process is connected to.

What is deployed is app.py's; a cluster in production uses a Serve config file instead."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from typing import NoReturn

import ray
from ray import serve as ray_serve
from ray._private.state import jobs
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve.context import _get_global_client
from ray.util.client import ray as client

from ot_ray import __version__
from ot_ray.errors import LaunchError
from ot_ray.launch import require_free_port
from serve.app import build_app
from serve.config import ServeConfig
from serve.gate import CALLBACK

APPLICATION = "offsite-tuning"
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
# In Ray's own table: the driver that attends to the service.
_OWNER = b"ot_ray/serve/owner"
_LOOK_S, _GONE_S = 5.0, 30.0


def run(config: ServeConfig) -> str:
    """Start the service and wait until the model can answer.

    One that runs already, and whose process was killed, is taken over: as it is where its settings are the same,
    and otherwise by a rolling update.

    Returns:
        The URL to give to a client as its base, which ends in `/v1`.

    Raises:
        PortInUseError: `port` belongs to another process; nothing was deployed.
        LaunchError: Ray is not started, already serves something, or the model could not be loaded;
            nothing stays deployed.
    """
    if not ray.is_initialized():
        raise LaunchError("Ray is not started in this process; call ray.init() before serving")
    taken_over = _take_over(config)
    if not taken_over:
        require_free_port(config.host, config.port)
        if ray_serve.status().proxies:
            raise LaunchError(
                "Ray Serve already runs on this Ray; stop it with `serve shutdown`, or deploy with a Serve config file"
            )
    as_it_is = taken_over and _stands_for(config)
    driver = {"driver": ray.get_runtime_context().get_job_id(), "made_of": _made_of(config)}
    _internal_kv_put(_OWNER, json.dumps(driver).encode(), overwrite=True)
    target = ray_serve.RunTarget(build_app(config.model_dump()), name=APPLICATION, route_prefix="/")
    deadline = time.monotonic() + config.start_timeout_s
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port},
            # Proxies inherit the environment of the controller, which starts them.
            controller_options={"runtime_env": {"env_vars": CALLBACK}},
        )
        if not as_it_is:
            ray_serve.run_many(
                [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
            )
        _wait_until_running(config, deadline, () if taken_over else _FAILED)
        url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
        _wait_until_healthy(url, deadline)
    except BaseException:
        # One that was there before may answer yet.
        if not taken_over:
            ray_serve.shutdown()
        raise
    return f"{url}/v1"


def attend() -> NoReturn:
    """Wait for as long as there is the Ray that `run` was called on; what runs there is Ray Serve's to keep alive.

    Raises:
        LaunchError: that Ray is gone, and the service with it.
    """
    context, seen = ray.get_runtime_context(), time.monotonic()
    node, head = context.get_node_id(), context.gcs_address

    def look() -> None:
        nonlocal seen
        while True:
            # A new head knows nothing of this node; Ray itself may end a process that asks it.
            with suppress(Exception):
                _connect(head)
                if any(known["NodeID"] == node and known["Alive"] for known in ray.nodes()):
                    seen = time.monotonic()
            time.sleep(_LOOK_S)

    threading.Thread(target=look, name="attend", daemon=True).start()
    while time.monotonic() < seen + _GONE_S:
        time.sleep(1.0)
    raise LaunchError("the Ray that the service ran on is gone; start both again")


def _connect(address: str) -> None:
    if not client.is_connected():
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _LOOK_S).close()


def shutdown() -> None:
    """Stop the service and Ray Serve with it; Ray itself goes on."""
    ray_serve.shutdown()
    _internal_kv_del(_OWNER)


def _take_over(config: ServeConfig) -> bool:
    """Whether the service runs here already, with nobody to attend to it since a process like this one was killed."""
    status = ray_serve.status()
    if not status.proxies or set(status.applications) - {APPLICATION} or client.is_connected():
        return False
    owner = _internal_kv_get(_OWNER)
    alive = {job["JobID"] for job in jobs() if not job["IsDead"]}
    if owner is None or json.loads(owner)["driver"] in alive:
        return False
    serving = _get_global_client()
    assert serving is not None
    if (serving.http_config.host, serving.http_config.port) == (config.host, config.port):
        return True
    # Where proxies listen is settled when Ray Serve starts.
    ray_serve.shutdown()
    return False


def _stands_for(config: ServeConfig) -> bool:
    """Whether what runs is what would be deployed: a new version of the same would need room for both."""
    owner, application = _internal_kv_get(_OWNER), ray_serve.status().applications.get(APPLICATION)
    if owner is None or application is None or application.status == "DEPLOY_FAILED":
        return False
    return json.loads(owner)["made_of"] == _made_of(config)


def _made_of(config: ServeConfig) -> str:
    return hashlib.sha256(f"{__version__} {config.model_dump_json()}".encode()).hexdigest()


def _wait_until_running(config: ServeConfig, deadline: float, failed: Collection[str]) -> None:
    _say(f"loading {config.model.name} from {config.model.source}")
    said = ""
    while True:
        application = ray_serve.status().applications.get(APPLICATION)
        if application is not None:
            if application.status == "RUNNING":
                return
            reasons = [item.message for item in application.deployments.values() if item.message]
            message = "; ".join(reasons) or application.message
            if application.status in failed:
                raise LaunchError(f"the service could not start: {message}")
            if message and message != said:
                _say(said := message)
        if time.monotonic() > deadline:
            raise LaunchError(
                f"the service did not start within start_timeout_s={config.start_timeout_s:g}; {said or 'raise it'}"
            )
        time.sleep(0.2)


def _wait_until_healthy(url: str, deadline: float) -> None:
    while True:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=30).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"{url}/healthz does not answer: {error}") from None
            time.sleep(0.2)


def _say(text: str) -> None:
    sys.stderr.write(f"serve: {text}\n")
    sys.stderr.flush()
