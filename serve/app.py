"""The Ray Serve application: a thin HTTP ingress in front of replicas of the engine.

`build_app` is for Serve config files and `ray_serve.run`; starting one on this machine is in local.py."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from ot_ray.config import parse
from serve.api import create_api
from serve.config import ServeConfig
from serve.remote import Engine, RemoteBackend
from serve.service import Service

# The ingress only passes bytes on, so it takes all that the engines and their queue can hold.
_INGRESS_REQUESTS = 10_000


@ray_serve.ingress()
class Api:
    """The HTTP side; Ray's proxy puts the request id on every answer."""

    def __init__(self, config: ServeConfig, engine: DeploymentHandle) -> None:
        self._config, self._engine = config, engine

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(Service(RemoteBackend(self._engine), self._config), answer_request_id=False)


def build_app(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application from plain values, as a Serve config file's `args` holds them.

    Args:
        args: the fields of `ServeConfig`.

    Raises:
        ConfigError: a field is unknown, missing or out of range.
    """
    config = parse(ServeConfig, args, "the application's args")
    engine = ray_serve.deployment(
        name="Engine",
        num_replicas=config.engines,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        health_check_timeout_s=60,
        max_constructor_retry_count=1,
    )(Engine)
    api = ray_serve.deployment(name="Api", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_INGRESS_REQUESTS)(
        Api
    )
    return api.bind(config, engine.bind(config))
