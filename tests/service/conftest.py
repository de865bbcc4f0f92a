"""What the service's tests share: a database, a store, the whole service in this process, and clients with keys.

Nothing here is simulated: SQLite on disk, a store folder, a tiny model that generates."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.artifacts import BundleManifest, Releases, generate_key, publish_bundle, write_adapter, write_bundle
from ot_ray.config import parse
from ot_ray.model import BottleneckSettings, LoraSettings, emulate, prepare_tuning
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.engine.loading import load_backend
from serve.service import Service
from tests.fixtures.tiny_model import base, checkpoint, one_thread, tokenizer
from tests.http.tiny_service import BASE, PLAN
from tests.service.clients import ClientOf, clients

__all__ = ["base", "checkpoint", "one_thread", "tokenizer"]


@pytest.fixture(scope="session")
def owner_keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The owner's signing keys, private first."""
    return generate_key(tmp_path_factory.mktemp("owner_keys"))


@pytest.fixture(scope="session")
def bundle_folder(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    owner_keys: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A signed bundle of the tiny model, shared: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    write_bundle(
        folder,
        emulate(base, PLAN, [0, 3]),
        tokenizer,
        PLAN,
        name=BASE,
        version="1",
        card="# A tiny model\n",
        recommended={"learning_rate": 1e-3},
        private_key=owner_keys[0],
    )
    return folder


@pytest.fixture(scope="session")
def tuned_adapters(base: PreTrainedModel, bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of the tiny bundle: `good`, and `bad`, whose weights are cut off."""
    folder = tmp_path_factory.mktemp("adapters")
    manifest = BundleManifest.model_validate_json((bundle_folder / "manifest.json").read_bytes())
    tuned = prepare_tuning(emulate(base, PLAN, [0, 3]), PLAN, "full", LoraSettings(), BottleneckSettings())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.01 * parameter.std().nan_to_num(0.0).clamp(min=0.01))
    write_adapter(folder / "good", tuned, manifest, method="full", steps=4, learning_rate=1e-3)
    shutil.copytree(folder / "good", folder / "bad")
    weights = next((folder / "bad").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty store."""
    return LocalStore(tmp_path / "store")


@pytest.fixture
def released(store: LocalStore, bundle_folder: Path) -> BundleManifest:
    """The tiny model's bundle, published and released in the test's store."""
    publish_bundle(store, bundle_folder)
    Releases(store, BASE).release("1")
    return BundleManifest.model_validate_json((bundle_folder / "manifest.json").read_bytes())


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite database that nobody opens: tests get copies, because migrating takes longer than copying."""
    path = tmp_path_factory.mktemp("database") / "empty.sqlite"
    catalogue = Catalogue.open(f"sqlite:///{path}")
    catalogue.migrate()
    catalogue.close()
    return path


@pytest.fixture
def database_url(empty_database: Path, tmp_path: Path) -> str:
    """The URL of a migrated, empty database of the test's own."""
    path = shutil.copy(empty_database, tmp_path / "service.sqlite")
    return f"sqlite:///{path}"


@pytest.fixture
def catalogue(database_url: str) -> Iterator[Catalogue]:
    opened = Catalogue.open(database_url)
    yield opened
    opened.close()


@pytest.fixture
def settings(checkpoint: Path, store: LocalStore, database_url: str) -> ServeConfig:
    """A service with everything on."""
    values = {
        "model": {"name": BASE, "source": str(checkpoint)},
        "store": store.url,
        "database": {"url": database_url},
        "refresh_s": 0,
        "max_choices": 8,
        "gradients": {},
    }
    return parse(ServeConfig, values, "test")


@pytest.fixture(scope="session")
def base_backend(checkpoint: Path) -> Iterator[Backend]:
    """An engine of the base model alone, for tests that promote nothing."""
    values = {"model": {"name": BASE, "source": str(checkpoint)}, "max_choices": 8}
    yield from _open_backend(parse(ServeConfig, values, "test"))


@pytest.fixture
def backend(settings: ServeConfig) -> Iterator[Backend]:
    """An engine that serves what the test's store holds, at once."""
    yield from _open_backend(settings)


def _open_backend(settings: ServeConfig) -> Iterator[Backend]:
    opened = load_backend(settings)
    yield opened
    close = getattr(opened, "close", None)
    if close is not None:
        close()


@pytest.fixture
def service(base_backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore) -> Service:
    """The service over the base model: enough for whatever doesn't ask a tuned model."""
    return Service(base_backend, settings, catalogue, store)


@pytest.fixture
def serving(backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore) -> Service:
    """The service with an engine of its own that serves what is promoted in the test's store."""
    return Service(backend, settings, catalogue, store)


@pytest.fixture
def client_of(service: Service) -> Iterator[ClientOf]:
    """`client_of("anna", scopes=("files",))` is a client with a new key of that tenant; `client_of(None)` has none."""
    yield from clients(service)


@pytest.fixture
def serving_client_of(serving: Service) -> Iterator[ClientOf]:
    """As `client_of`, of the service that serves what is promoted in the test's store."""
    yield from clients(serving)
