"""One bundle of every family, written once; tests that change files work on copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ot_ray.artifacts import generate_key, open_bundle, write_bundle
from ot_ray.model import TEXT_FAMILIES, emulate
from tests.artifacts.samples import DEPTH, KEPT, PLAN, Sample, tiny_tokenizer
from tests.fixtures.models import tiny_model


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return generate_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Callable[[str], Sample]:
    """The sample of a family, made on first use. Its models and folder are shared: copy before changing."""
    made: dict[str, Sample] = {}

    def get(model_type: str) -> Sample:
        if model_type not in made:
            full = tiny_model(model_type, depth=DEPTH)
            full.config._name_or_path = "/secret/place"
            full.config.original_depth = DEPTH
            emulated = emulate(full, PLAN, KEPT)
            folder = tmp_path_factory.mktemp("bundles") / model_type
            write_bundle(
                folder,
                emulated,
                tiny_tokenizer(),
                PLAN,
                name=f"tiny-{model_type}",
                version="1",
                card="# A tiny model\n",
                recommended={"learning_rate": 1e-4},
                private_key=keys[0],
            )
            made[model_type] = Sample(full, emulated, open_bundle(folder, keys[1]))
        return made[model_type]

    return get


@pytest.fixture(params=sorted(TEXT_FAMILIES))
def family(request: pytest.FixtureRequest, sample: Callable[[str], Sample]) -> Sample:
    return sample(request.param)


@pytest.fixture
def opt(sample: Callable[[str], Sample]) -> Sample:
    return sample("opt")


@pytest.fixture
def bundle_copy(opt: Sample, tmp_path: Path) -> Path:
    """A bundle that the test may change."""
    return shutil.copytree(opt.bundle.folder, tmp_path / "bundle")
