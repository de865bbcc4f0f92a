from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from ray import serve as ray_serve

from ot_ray.artifacts import load_full
from ot_ray.cola import find_sites
from ot_ray.errors import LaunchError
from ot_ray.store import LocalStore
from serve.app import build_app
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.gradients.loading import reached_sites
from serve.gradients.worker import GradientWorker
from serve.remote_gradients import Gradients
from serve.settings.gradients import GradientsConfig
from tests.fixtures.models import tiny_model
from tests.service.gradient_scene import Scene, auxiliary_of, by_autograd, rows_of

PATIENCE_S = 120.0


def until(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def config(settings: ServeConfig) -> ServeConfig:
    return settings.model_copy(update={"gradients": GradientsConfig(poll_s=0.02)})


@pytest.fixture
def scene(catalogue: Catalogue, store: LocalStore, config: ServeConfig) -> Scene:
    return Scene(catalogue, store, load_full(config.model).requires_grad_(False))


def test_a_replica_carries_out_what_is_asked(scene: Scene, config: ServeConfig) -> None:
    session = scene.session()
    first = scene.forward_backward(session, rows_of(1, 8))
    replica = Gradients(config)
    try:
        until(lambda: scene.found(session, first).status == "succeeded")
        second = scene.forward_backward(session, rows_of(2, 8))
        until(lambda: scene.found(session, second).status == "succeeded")
        replica.check_health()
        until(lambda: replica.stats() == {"succeeded": 2, "failed": 0})
    finally:
        replica.close()
    start = auxiliary_of(session, scene.model)
    for number, seed in ((first, 1), (second, 2)):
        loss, _ = by_autograd(scene.model, [(1.0, start)], start, rows_of(seed, 8))
        assert scene.result(session, number)["loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(LaunchError, match="no rounds"):
        replica.check_health()


def test_a_replica_goes_on_after_an_error_and_ends_with_its_device(
    scene: Scene, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, errors = GradientWorker.round, [LaunchError("the device is gone"), ValueError("an odd one")]

    def round_(worker: GradientWorker) -> bool:
        if len(errors) == 2:
            raise errors.pop()
        done = own(worker)
        if done:
            raise errors.pop()
        return done

    monkeypatch.setattr(GradientWorker, "round", round_)
    session = scene.session()
    number = scene.forward_backward(session, rows_of(1, 8))
    replica = Gradients(config)
    try:
        until(lambda: scene.found(session, number).status == "succeeded")

        def unwell() -> bool:
            try:
                replica.check_health()
            except LaunchError:
                return True
            return False

        until(unwell)
    finally:
        replica.close()


def test_the_application_has_replicas_where_they_are_set(config: ServeConfig) -> None:
    settings = GradientsConfig(replicas=3, num_cpus=0.5)
    app = build_app(config.model_copy(update={"gradients": settings}).model_dump())
    assert isinstance(app, ray_serve.Application)
    bound = app._bound_deployment.init_args[3]._bound_deployment
    assert (bound.name, bound.num_replicas, bound.ray_actor_options["num_cpus"]) == ("Gradients", 3, 0.5)
    assert build_app(config.model_copy(update={"gradients": None}).model_dump())._bound_deployment.init_args[3] is None


def test_gradient_learning_needs_a_database() -> None:
    values = {"model": {"name": "tiny", "source": "."}, "gradients": {}}
    with pytest.raises(ValueError, match="database is not"):
        ServeConfig.model_validate(values)
    with pytest.raises(ValueError, match="max_rows"):
        GradientsConfig(max_rows=2)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "bloom"])
def test_sites_that_no_gradient_comes_to_are_known(family: str) -> None:
    model = tiny_model(family, depth=2)
    sites = find_sites(model, "*")
    unreached = {name.rpartition(".")[2] for name in sites.keys() - reached_sites(model, sites)}
    assert unreached == {"opt": {"lm_head"}, "gpt2": {"lm_head", "wpe"}}.get(family, {"lm_head"})
