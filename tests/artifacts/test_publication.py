from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ot_ray.artifacts import fetch_bundle, list_versions, publish_bundle, write_bundle
from ot_ray.errors import AlreadyExistsError, ArtifactError, NotFoundError, SignatureError, StoreError
from ot_ray.store import LocalStore
from tests.artifacts.samples import PLAN, Sample, flip
from tests.fixtures.models import tokens


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_there_and_back(store: LocalStore, opt: Sample, keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert publish_bundle(store, opt.bundle.folder) == "bundles/tiny-opt/1"
    bundle = fetch_bundle(store, "tiny-opt", "1", tmp_path / "here", keys[1])
    assert bundle.manifest == opt.bundle.manifest
    with torch.no_grad():
        assert torch.equal(bundle.load_model()(tokens()).logits, opt.emulated(tokens()).logits)


def test_progress_counts_every_byte(store: LocalStore, opt: Sample, tmp_path: Path) -> None:
    up: list[int] = []
    down: list[int] = []
    publish_bundle(store, opt.bundle.folder, up.append)
    fetch_bundle(store, "tiny-opt", "1", tmp_path / "here", progress=down.append)
    listed = sum(entry.bytes for entry in opt.bundle.manifest.files.values())
    assert sum(up) == sum(path.stat().st_size for path in opt.bundle.folder.iterdir())
    assert sum(down) == listed


def test_a_version_is_published_once(store: LocalStore, opt: Sample, tmp_path: Path) -> None:
    publish_bundle(store, opt.bundle.folder)
    other = tmp_path / "other"
    write_bundle(other, opt.emulated, None, PLAN, name="tiny-opt", version="1", card="", recommended={})
    with pytest.raises(AlreadyExistsError, match="version 1 of tiny-opt is already published"):
        publish_bundle(store, other)
    assert fetch_bundle(store, "tiny-opt", "1", tmp_path / "here").manifest == opt.bundle.manifest


def test_what_a_failed_upload_left_is_not_fetched(store: LocalStore, opt: Sample, tmp_path: Path) -> None:
    store.write("bundles/tiny-opt/1/leftover.json", b"{}")
    assert list_versions(store, "tiny-opt") == []
    publish_bundle(store, opt.bundle.folder)
    fetch_bundle(store, "tiny-opt", "1", tmp_path / "here")
    assert not (tmp_path / "here" / "leftover.json").exists()


def test_versions_in_natural_order(store: LocalStore, opt: Sample, tmp_path: Path) -> None:
    for version in ("1.10", "1.9", "2026-01-02", "beta"):
        folder = tmp_path / version
        write_bundle(folder, opt.emulated, None, PLAN, name="m", version=version, card="", recommended={})
        publish_bundle(store, folder)
    assert list_versions(store, "m") == ["1.9", "1.10", "2026-01-02", "beta"]
    with pytest.raises(NotFoundError, match=r"published versions: 1\.9, 1\.10"):
        fetch_bundle(store, "m", "3", tmp_path / "here")
    assert list_versions(store, "other") == []


def test_invalid_bundle_is_not_published(store: LocalStore, bundle_copy: Path) -> None:
    flip(bundle_copy / "config.json")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        publish_bundle(store, bundle_copy)
    assert list(store.list()) == []


@pytest.mark.parametrize("name", ["emulator.safetensors", "manifest.json", "model.sig"])
def test_changed_object_leaves_no_folder(
    store: LocalStore, opt: Sample, keys: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    prefix = publish_bundle(store, opt.bundle.folder)
    flip(store.root / prefix / name)
    with pytest.raises((StoreError, ArtifactError), match=name):
        fetch_bundle(store, "tiny-opt", "1", tmp_path / "here", keys[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_unsigned_bundle_is_refused_where_a_key_is_given(
    store: LocalStore, opt: Sample, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    write_bundle(tmp_path / "b", opt.emulated, None, PLAN, name="m", version="1", card="", recommended={})
    publish_bundle(store, tmp_path / "b")
    with pytest.raises(SignatureError, match="not signed"):
        fetch_bundle(store, "m", "1", tmp_path / "here", keys[1])


def test_folder_with_files_is_left_alone(store: LocalStore, opt: Sample, tmp_path: Path) -> None:
    publish_bundle(store, opt.bundle.folder)
    here = shutil.copytree(opt.bundle.folder, tmp_path / "here")
    with pytest.raises(AlreadyExistsError, match="choose another folder"):
        fetch_bundle(store, "tiny-opt", "1", here)


@pytest.mark.parametrize(("model", "version"), [("../up", "1"), ("m", "a/b"), ("m\n", "1"), ("", "1")])
def test_names_that_lead_elsewhere_are_refused(store: LocalStore, tmp_path: Path, model: str, version: str) -> None:
    with pytest.raises(ArtifactError, match="which is no name"):
        fetch_bundle(store, model, version, tmp_path / "here")
