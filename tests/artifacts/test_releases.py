"""Which version is current, and what a source without a version opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from ot_ray.artifacts import BundleSource, Releases, publish_bundle, write_bundle
from ot_ray.errors import ArtifactError, NotFoundError
from ot_ray.store import LocalStore
from tests.artifacts.samples import PLAN, Sample


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def published(store: LocalStore, opt: Sample, tmp_path: Path) -> list[str]:
    versions = ["1", "2", "3"]
    for version in versions:
        folder = tmp_path / version
        write_bundle(folder, opt.emulated, None, PLAN, name="m", version=version, card=f"# {version}\n", recommended={})
        publish_bundle(store, folder)
    return versions


def opened(store: LocalStore, place: Path, version: str | None = None) -> str:
    source = BundleSource(store=str(store.root), model="m", version=version)
    return source.open(place).manifest.version


def test_the_last_release_is_current(store: LocalStore, published: list[str], tmp_path: Path) -> None:
    releases = Releases(store, "m")
    assert releases.current() is None
    for version in ("1", "3"):
        releases.release(version)
        assert opened(store, tmp_path / f"open-{version}") == version
    assert opened(store, tmp_path / "named", "2") == "2"
    assert [entry.model_id for entry in releases.entries()] == ["1", "3"]
    assert (releases.released("3"), releases.released("2")) == (True, False)


def test_a_release_twice_is_one_entry(store: LocalStore, published: list[str]) -> None:
    releases = Releases(store, "m")
    releases.release("1")
    releases.release("1")
    assert list(store.list("releases")) == ["releases/m/000001.json"]


def test_back_to_the_one_before(store: LocalStore, published: list[str], tmp_path: Path) -> None:
    releases = Releases(store, "m")
    releases.release("1")
    releases.release("2")
    assert releases.rollback() == "1"
    assert opened(store, tmp_path / "open") == "1"
    assert releases.released("2")
    with pytest.raises(NotFoundError, match="no earlier version"):
        releases.rollback()


def test_what_is_not_published_is_not_released(store: LocalStore, published: list[str]) -> None:
    with pytest.raises(NotFoundError, match=r"version 9 of m is not published.*published versions: 1, 2, 3"):
        Releases(store, "m").release("9")
    assert Releases(store, "m").current() is None


def test_nothing_released_yet(store: LocalStore, published: list[str], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no version of m is released.*set version to one of.*1, 2, 3"):
        opened(store, tmp_path / "open")
    with pytest.raises(NotFoundError, match="published versions: none"):
        Releases(store, "other").require_current()


def test_a_name_that_leads_elsewhere_is_refused(store: LocalStore) -> None:
    with pytest.raises(ArtifactError, match="which is no name"):
        Releases(store, "../up")


@pytest.mark.parametrize(
    "values", [{}, {"store": "s"}, {"model": "m"}, {"version": "1"}, {"folder": "f", "store": "s"}]
)
def test_a_source_names_one_place(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"name a folder, or a store|needs both store and model"):
        BundleSource(**values)
