"""Starts and stops the service on the Ray that this process is connected to, and waits until it answers.

What is deployed is app.py's; a cluster in production uses a Serve config file instead."""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request

import ray
from ray import serve as ray_serve

from ot_ray.errors import LaunchError
from ot_ray.launch import require_free_port
from serve.app import build_app
from serve.config import ServeConfig

APPLICATION = "offsite-tuning"
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def run(config: ServeConfig) -> str:
    """Start the service and wait until the model can answer.

    Returns:
        The URL to give to a client as its base, which ends in `/v1`.

    Raises:
        PortInUseError: `port` belongs to another process; nothing was deployed.
        LaunchError: Ray is not started, already serves something, or the model could not be loaded;
            nothing stays deployed.
    """
    if not ray.is_initialized():
        raise LaunchError("Ray is not started in this process; call ray.init() before serving")
    require_free_port(config.host, config.port)
    if ray_serve.status().proxies:
        raise LaunchError(
            "Ray Serve already runs on this Ray; stop it with `serve shutdown`, or deploy with a Serve config file"
        )
    target = ray_serve.RunTarget(build_app(config.model_dump()), name=APPLICATION, route_prefix="/")
    deadline = time.monotonic() + config.start_timeout_s
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
        ray_serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_running(config, deadline)
        url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
        _wait_until_healthy(url, deadline)
    except BaseException:
        ray_serve.shutdown()
        raise
    return f"{url}/v1"


def shutdown() -> None:
    """Stop the service and Ray Serve with it; Ray itself goes on."""
    ray_serve.shutdown()


def _wait_until_running(config: ServeConfig, deadline: float) -> None:
    _say(f"loading {config.model.name} from {config.model.source}")
    said = ""
    while True:
        application = ray_serve.status().applications.get(APPLICATION)
        if application is not None:
            if application.status == "RUNNING":
                return
            reasons = [item.message for item in application.deployments.values() if item.message]
            message = "; ".join(reasons) or application.message
            if application.status in _FAILED:
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
