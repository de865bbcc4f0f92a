"""Documents stay readable to whoever knows the first format, as long as they hold nothing that it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import AwareDatetime

from ot_ray.artifacts import Registry, open_bundle, write_bundle
from ot_ray.artifacts.manifest import AdapterManifest, FileEntry, TensorEntry
from ot_ray.artifacts.strict_json import parse_json, read_json
from ot_ray.config import Config
from ot_ray.errors import ArtifactError
from ot_ray.model import Method, SplitPlan, adapter_state, emulate
from ot_ray.store import LocalStore
from tests.artifacts.samples import KEPT, PLAN, Sample, returned
from tests.fixtures.models import tiny_image_model

FIRST_METHODS: tuple[Method, ...] = ("full", "lora")


class FirstBundle(Config):
    """The keys of a bundle's manifest in format 1."""

    schema_version: Literal[1]
    bundle_id: str
    model: str
    version: str
    model_type: str
    plan: SplitPlan
    adapter: tuple[TensorEntry, ...]
    files: dict[str, FileEntry]
    methods: tuple[Literal["full", "lora"], ...]
    recommended: dict[str, bool | int | float | str]
    created: AwareDatetime
    expires: AwareDatetime | None
    signing_key_id: str | None


class FirstAdapter(Config):
    """The keys of an adapter's manifest in format 1."""

    schema_version: Literal[1]
    bundle_id: str
    model: str
    version: str
    method: Literal["full", "lora"]
    files: dict[str, FileEntry]
    steps: int
    learning_rate: float
    validation_loss: float | None
    created: AwareDatetime


class FirstRecord(Config):
    """The keys of a plug-in's record in format 1."""

    schema_version: Literal[1]
    model_id: str
    bundle_id: str
    plan: SplitPlan
    sha256: str
    report: dict[str, float]
    created: AwareDatetime


def written(folder: Path, model: Any, **fields: Any) -> Path:
    settings = {"name": "tiny", "version": "1", "card": "", "recommended": {}, **fields}
    write_bundle(folder, emulate(model, PLAN, KEPT), None, PLAN, **settings)
    return folder / "manifest.json"


def record_of(store: LocalStore) -> bytes:
    (key,) = [key for key in store.list() if key.endswith("/record.json")]
    return store.read(key)


def test_a_bundle_of_text_for_the_first_methods(opt: Sample, tmp_path: Path) -> None:
    path = written(tmp_path / "bundle", opt.full, methods=FIRST_METHODS)
    assert read_json(FirstBundle, path).methods == FIRST_METHODS


@pytest.mark.parametrize("method", FIRST_METHODS)
def test_an_adapter_of_the_first_methods(opt: Sample, method: str, tmp_path: Path) -> None:
    folder, _ = returned(opt, tmp_path / "adapter", method)
    assert read_json(FirstAdapter, folder / "manifest.json").method == method


def test_a_record_without_classes(opt: Sample, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    state = adapter_state(opt.full, PLAN)
    Registry(store).add("m", "t", "s", state, bundle_id="m-1-0123456789ab", plan=PLAN, report={"full": 2.0})
    assert parse_json(FirstRecord, record_of(store), "record.json").report == {"full": 2.0}


@pytest.mark.parametrize("methods", [FIRST_METHODS, ("full", "bitfit")])
def test_a_bundle_of_images_or_for_later_methods_names_its_format(
    opt: Sample, methods: tuple[Method, ...], tmp_path: Path
) -> None:
    full = tiny_image_model("vit", depth=opt.full.config.num_hidden_layers) if methods == FIRST_METHODS else opt.full
    refused_by_the_first(FirstBundle, written(tmp_path / "bundle", full, methods=methods))
    assert open_bundle(tmp_path / "bundle").manifest.schema_version == 2


@pytest.mark.parametrize("method", ["bottleneck", "bitfit"])
def test_an_adapter_of_a_later_method_names_its_format(opt: Sample, method: str, tmp_path: Path) -> None:
    folder, _ = returned(opt, tmp_path / "adapter", method)
    refused_by_the_first(FirstAdapter, folder / "manifest.json")
    found = read_json(AdapterManifest, folder / "manifest.json")
    assert (found.schema_version, found.bottleneck) == (2, 5 if method == "bottleneck" else None)


def test_a_record_with_classes_names_its_format(opt: Sample, tmp_path: Path) -> None:
    registry = Registry(LocalStore(tmp_path / "store"))
    state = adapter_state(opt.full, PLAN)
    record = registry.add("m", "t", "s", state, bundle_id="m-1-0123456789ab", plan=PLAN, report={}, classes=["a", "b"])
    (tmp_path / "record.json").write_bytes(record_of(LocalStore(tmp_path / "store")))
    refused_by_the_first(FirstRecord, tmp_path / "record.json")
    assert registry.get(record.model_id) == record
    assert (record.schema_version, record.classes) == (2, ("a", "b"))


def test_documents_that_state_the_later_keys_in_the_first_format_are_read(opt: Sample, tmp_path: Path) -> None:
    folder, _ = returned(opt, tmp_path / "adapter", "full")
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, "bottleneck": None, "classes": None}))
    assert read_json(AdapterManifest, folder / "manifest.json").classes is None


def refused_by_the_first(schema: type[Config], path: Path) -> None:
    with pytest.raises(ArtifactError, match="schema_version is '2'"):
        read_json(schema, path)
