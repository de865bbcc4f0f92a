"""The Ray Serve application: a thin HTTP ingress in front of replicas of the engine.

`build_app` is for Serve config files and `ray_serve.run`; starting one on this machine is in local.py."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from ot_ray.config import parse
from ot_ray.store import open_store
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.remote import Engine, RemoteBackend
from serve.remote_controller import JobController
from serve.remote_gradients import Gradients
from serve.service import Service

# The ingress only passes bytes on, so it takes all that the engines and their queue can hold.
_INGRESS_REQUESTS = 10_000
# How soon a replica that died is missed.
_HEALTH_S = 5.0


@ray_serve.ingress()
class Api:
    """The HTTP side; Ray's proxy puts the request id on every answer.

    Args:
        controller, gradients: of a service with a database; they take no requests, and are here because an application
            deploys what its ingress is bound to.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine: DeploymentHandle,
        controller: DeploymentHandle | None,
        gradients: DeploymentHandle | None = None,
    ) -> None:
        self._config, self._engine = config, engine

    def __serve_build_asgi_app__(self) -> FastAPI:
        config, catalogue = self._config, None
        if config.database is not None:
            catalogue = Catalogue.open(config.database)
            # The controller may not be there yet.
            catalogue.migrate(config.database.start_wait_s)
        store = open_store(config.store) if config.store is not None else None
        return create_api(Service(RemoteBackend(self._engine), config, catalogue, store), answer_request_id=False)


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
        **_replicas(config),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=60,
        max_constructor_retry_count=1,
        max_surge_percent=config.surge_percent,
        graceful_shutdown_timeout_s=config.drain_s,
    )(Engine)
    api = ray_serve.deployment(
        name="Api",
        num_replicas=config.apis,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_INGRESS_REQUESTS,
        health_check_period_s=_HEALTH_S,
        # A new one costs little, and answers pass through it as long as an engine makes them.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=config.drain_s,
    )(Api)
    engines = engine.bind(config)
    return api.bind(config, engines, _controller(config, engines), _gradients(config))


def _replicas(config: ServeConfig) -> dict[str, Any]:
    if config.max_engines is None:
        return {"num_replicas": config.engines}
    # A batch that is full is the time for another engine.
    scaling = {
        "min_replicas": config.engines,
        "max_replicas": config.max_engines,
        "target_ongoing_requests": config.max_concurrent,
        "look_back_period_s": config.scale_window_s,
        "upscale_delay_s": config.scale_up_s,
        "downscale_delay_s": config.scale_down_s,
    }
    return {"autoscaling_config": scaling}


def _controller(config: ServeConfig, engines: ray_serve.Application) -> ray_serve.Application | None:
    if config.database is None:
        return None
    controller = ray_serve.deployment(
        name="Controller",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=10,
    )(JobController)
    return controller.bind(config, engines)


def _gradients(config: ServeConfig) -> ray_serve.Application | None:
    settings = config.gradients
    if settings is None:
        return None
    gradients = ray_serve.deployment(
        name="Gradients",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=60,
        max_constructor_retry_count=1,
        max_surge_percent=config.surge_percent,
        # What is not over is begun anew by another replica.
        graceful_shutdown_timeout_s=10,
    )(Gradients)
    return gradients.bind(config)
