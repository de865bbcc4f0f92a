from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ot_ray.artifacts import BundleManifest, open_bundle, write_bundle
from ot_ray.artifacts.folder import describe_files
from ot_ray.artifacts.manifest import bundle_id, to_text
from ot_ray.errors import AlreadyExistsError, ArtifactError, NotFoundError, SignatureError
from ot_ray.model import SplitPlan, adapter_state
from tests.artifacts.samples import DEPTH, KEPT, PLAN, Sample, flip, tiny_tokenizer
from tests.fixtures.models import tokens

FILES = {
    "README.md",
    "adapter.safetensors",
    "config.json",
    "emulator.safetensors",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def write(folder: Path, sample: Sample, **changes: Any) -> BundleManifest:
    values = {"name": "m", "version": "1", "card": "", "recommended": {}, **changes}
    model, plan = values.pop("model", sample.emulated), values.pop("plan", PLAN)
    return write_bundle(folder, model, values.pop("tokenizer", None), plan, **values)


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON document."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def test_transformers_opens_it_as_the_emulated_model(family: Sample) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(family.bundle.folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected = family.emulated(tokens()).logits
        assert torch.equal(model.eval()(tokens()).logits, expected)
        assert torch.equal(family.bundle.load_model()(tokens()).logits, expected)


def test_manifest_names_the_adapter_tensors(family: Sample) -> None:
    manifest = family.bundle.manifest
    with safe_open(family.bundle.folder / "adapter.safetensors", "pt") as file:
        stored = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert {entry.name: entry.shape for entry in manifest.adapter} == stored
    assert {entry.dtype for entry in manifest.adapter} == {"F32"}
    assert len(stored) == len(adapter_state(family.emulated, PLAN))
    assert set(manifest.files) == FILES


def test_nothing_tells_of_the_full_model(family: Sample) -> None:
    folder = family.bundle.folder
    for path in folder.glob("*.json"):
        if path.name == "tokenizer.json":
            continue  # the vocabulary numbers its words
        text = path.read_text()
        assert "/secret" not in text, path.name
        assert "original_depth" not in text, path.name
        assert str(folder.parent) not in text, path.name
        for name in ("kept", "depth", "middle"):
            assert f'"{name}"' not in text, path.name
        assert DEPTH not in numbers(json.loads(text)), path.name
    config = json.loads((folder / "config.json").read_text())
    assert not {*KEPT, DEPTH, DEPTH - 1} & {
        value for key, value in config.items() if "layer" in key and type(value) is int
    }
    for name in ("adapter.safetensors", "emulator.safetensors"):
        with safe_open(folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_sliding_window_limit_follows_from_the_bundle(sample: Any) -> None:
    config = json.loads((sample("qwen2").bundle.folder / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", *["sliding_attention"] * 3]
    assert config["max_window_layers"] == 1


def test_tied_head_is_stored_once(opt: Sample) -> None:
    index = json.loads((opt.bundle.folder / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert "model.decoder.embed_tokens.weight" in index["weight_map"]


def test_tokenizer_comes_back(opt: Sample) -> None:
    assert opt.bundle.load_tokenizer()("w5 w9")["input_ids"] == [5, 9]


def test_loads_in_another_dtype(opt: Sample) -> None:
    assert {p.dtype for p in opt.bundle.load_model(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_half_precision_is_kept(opt: Sample, tmp_path: Path) -> None:
    model = opt.bundle.load_model(torch.bfloat16)
    manifest = write(tmp_path / "b", opt, model=model)
    assert {entry.dtype for entry in manifest.adapter} == {"BF16"}
    loaded = open_bundle(tmp_path / "b").load_model(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_same_content_has_the_same_id(opt: Sample, tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, opt) for name in "ab")
    other = write(tmp_path / "c", opt, card="another card")
    assert first.bundle_id == second.bundle_id
    assert first.bundle_id.startswith("m-1-")
    assert other.bundle_id != first.bundle_id


def test_full_model_is_refused(opt: Sample, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="never the full one"):
        write(tmp_path / "b", opt, model=opt.full)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "../up"}, "model is '../up'"),
        ({"version": "a b"}, "version is 'a b'"),
        ({"methods": ["prefix"]}, "methods.0 is 'prefix'"),
        ({"recommended": {"learning_rate": float("nan")}}, "recommended"),
        ({"expires": datetime(2030, 1, 1)}, "expires"),
    ],
)
def test_values_that_do_not_fit_leave_nothing(
    opt: Sample, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ArtifactError, match=reason):
        write(tmp_path / "b", opt, **changes)
    assert not list(tmp_path.iterdir())


def test_other_dtypes_are_refused(opt: Sample, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"torch\.float64"):
        write(tmp_path / "b", opt, model=opt.bundle.load_model().double())


def test_a_folder_with_files_is_left_alone(opt: Sample, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(AlreadyExistsError, match="choose another folder"):
        write(tmp_path, opt)
    assert os.listdir(tmp_path) == ["keep.txt"]


def test_tokenizer_may_be_left_out(opt: Sample, tmp_path: Path) -> None:
    write(tmp_path / "b", opt)
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json"):
        open_bundle(tmp_path / "b").load_tokenizer()


def test_tokenizer_keeps_no_path(opt: Sample, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["name_or_path"] = tokenizer.name_or_path = "/secret/place"
    write(tmp_path / "b", opt, tokenizer=tokenizer)
    assert "/secret" not in (tmp_path / "b" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", sorted({*FILES, "manifest.json", "model.sig"}))
def test_one_changed_bit_is_refused(bundle_copy: Path, keys: tuple[Path, Path], name: str) -> None:
    flip(bundle_copy / name)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        open_bundle(bundle_copy, keys[1])


@pytest.mark.parametrize("name", ["config.json", "emulator.safetensors", "manifest.json", "model.sig"])
def test_missing_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("notes.txt", "notes.txt is not in the manifest"),
        ("modeling_tiny.py", "modeling_tiny.py is pickled, code"),
        ("pytorch_model.bin", "pytorch_model.bin is pickled, code"),
        ("sub/extra.json", "sub/extra.json is not in the manifest"),
        (".hidden", ".hidden is pickled, code or of an unknown kind"),
    ],
)
def test_extra_file_is_named(bundle_copy: Path, name: str, reason: str) -> None:
    (bundle_copy / name).parent.mkdir(exist_ok=True)
    (bundle_copy / name).write_text("x")
    with pytest.raises(ArtifactError, match=reason):
        open_bundle(bundle_copy)


def test_links_and_empty_folders_are_refused(bundle_copy: Path, tmp_path: Path) -> None:
    shutil.move(bundle_copy / "README.md", tmp_path / "README.md")
    (bundle_copy / "README.md").symlink_to(tmp_path / "README.md")
    with pytest.raises(ArtifactError, match=r"README\.md is a link"):
        open_bundle(bundle_copy)
    (bundle_copy / "README.md").unlink()
    (bundle_copy / "README.md").mkdir()
    with pytest.raises(ArtifactError, match=r"README\.md is an empty folder"):
        open_bundle(bundle_copy)


def test_truncated_file_names_both_sizes(bundle_copy: Path) -> None:
    path = bundle_copy / "adapter.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"adapter\.safetensors has {size - 1} bytes, the manifest says {size}"):
        open_bundle(bundle_copy)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change a manifest so that it still fits the files."""
    manifest = BundleManifest.model_validate_json((folder / "manifest.json").read_bytes())
    files = describe_files(folder, manifest.files)
    values = {"files": files, "bundle_id": bundle_id(manifest.model, manifest.version, files), **changes}
    (folder / "manifest.json").write_bytes(to_text(manifest.model_copy(update=values)))


def test_changes_that_fit_the_manifest_need_the_key(bundle_copy: Path, keys: tuple[Path, Path]) -> None:
    flip(bundle_copy / "emulator.safetensors", at=1)
    rewrite(bundle_copy)
    open_bundle(bundle_copy)
    with pytest.raises(SignatureError, match="emulator"):
        open_bundle(bundle_copy, keys[1])


def test_unsigned_bundle_is_refused_where_a_key_is_given(bundle_copy: Path, keys: tuple[Path, Path]) -> None:
    (bundle_copy / "model.sig").unlink()
    rewrite(bundle_copy, signing_key_id=None)
    open_bundle(bundle_copy)
    with pytest.raises(SignatureError, match="not signed"):
        open_bundle(bundle_copy, keys[1])


def test_expired_bundle_is_refused(bundle_copy: Path) -> None:
    past = datetime.now(timezone.utc) - timedelta(seconds=5)
    rewrite(bundle_copy, expires=past)
    with pytest.raises(ArtifactError, match=r"expires is .* past"):
        open_bundle(bundle_copy)
    rewrite(bundle_copy, expires=past + timedelta(hours=1))
    open_bundle(bundle_copy)


def test_unknown_keys_and_schemas_are_refused(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "depth": 24}))
    with pytest.raises(ArtifactError, match="unknown key depth"):
        open_bundle(bundle_copy)
    path.write_text(json.dumps({**values, "schema_version": 3}))
    with pytest.raises(ArtifactError, match="schema_version is '3'"):
        open_bundle(bundle_copy)
    path.write_text(path.read_text().replace("{", '{"model": "other",', 1))
    with pytest.raises(ArtifactError, match="'model' stands twice"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", ["../config.json", "/etc/hosts.txt", "weights.bin", "a/../b.json"])
def test_manifest_cannot_list_paths_outside_or_code(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / "manifest.json"
    values = json.loads(path.read_text())
    values["files"][name] = values["files"]["config.json"]
    path.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=f"files.{name} is"):
        open_bundle(bundle_copy)


def test_wrong_id_is_refused(bundle_copy: Path) -> None:
    rewrite(bundle_copy, bundle_id="tiny-opt-1-000000000000")
    with pytest.raises(ArtifactError, match="bundle_id is tiny-opt-1-000000000000, but"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("config.json", '"model_type": "opt"', '"model_type": "llama"', "model_type is 'llama'"),
        ("config.json", "{", '{"auto_map": {"AutoModel": "x.Y"},', "code of its own"),
        ("config.json", "{", '{"text_config": {"x": [{"auto_map": {"AutoModel": "x.Y"}}]},', "code of its own"),
        ("model.safetensors.index.json", '"emulator.safetensors"', '"../x.safetensors"', "weight_map"),
    ],
)
def test_checkpoint_that_leads_elsewhere_is_refused(
    bundle_copy: Path, file: str, old: str, new: str, reason: str
) -> None:
    path = bundle_copy / file
    path.write_text(path.read_text().replace(old, new, 1))
    rewrite(bundle_copy)
    with pytest.raises(ArtifactError, match=reason):
        open_bundle(bundle_copy)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        open_bundle(tmp_path / "nowhere")


def test_an_adapter_of_one_side_only(opt: Sample, tmp_path: Path) -> None:
    plan = SplitPlan(bottom=0, keep=3, top=1)
    manifest = write(tmp_path / "b", opt, plan=plan)
    assert {entry.name.split(".")[3] for entry in manifest.adapter} == {"3"}
