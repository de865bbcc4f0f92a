from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ot_ray.artifacts import AdapterManifest, InspectionLimits, inspect_adapter, plain_state
from ot_ray.artifacts.folder import describe_files
from ot_ray.errors import AdapterRejectedError, ArtifactError, NotFoundError
from ot_ray.model import METHODS, adapter_state
from tests.artifacts.hostile import Change, change_config, change_tensors, put, rejection, relist, spoil
from tests.artifacts.samples import PLAN, Sample, flip, returned

FULL = "model.decoder.layers.0.fc1.weight"
LORA = "base_model.model.model.decoder.layers.0.fc1.lora_A.weight"


@pytest.fixture(scope="module")
def sent(sample: Callable[[str], Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of each method, which tests copy."""
    place = tmp_path_factory.mktemp("sent")
    for method in METHODS:
        returned(sample("opt"), place / method, method)
    return place


@pytest.fixture
def full(sent: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sent / "full", tmp_path / "full")


@pytest.fixture
def lora(sent: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sent / "lora", tmp_path / "lora")


@pytest.mark.parametrize("method", METHODS)
def test_sound_adapter_passes(opt: Sample, sent: Path, method: str) -> None:
    found = inspect_adapter(sent / method, opt.bundle.manifest)
    assert found.manifest.method == method
    assert (found.lora is None) == (method != "lora")
    assert found.manifest.bottleneck == (5 if method == "bottleneck" else None)
    assert all(
        torch.equal(found.tensors[n], t) for n, t in load_file(next((sent / method).glob("*.safetensors"))).items()
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil(FULL, float("nan"), 3), f"tensor {FULL} holds 3 values that are not finite"),
        (spoil(FULL, float("-inf")), f"tensor {FULL} holds 1 values that are not finite"),
        (put(FULL, lambda t: t.T.contiguous()), f"tensor {FULL} has shape (32, 48), not (48, 32)"),
        (put(FULL, lambda t: t.double()), f"tensor {FULL} has dtype F64"),
        (put(FULL, lambda t: t.to(torch.int32)), f"tensor {FULL} has dtype I32"),
        (lambda tensors: tensors.pop(FULL), f"tensor {FULL} is missing"),
        (put("lm_head.weight", torch.ones(1)), "tensor lm_head.weight is not part of the adapter"),
        (put(FULL.replace("0", "1"), torch.ones(1)), f"tensor {FULL.replace('0', '1')} is not part of the adapter"),
        (put("../../x", torch.ones(1)), "tensor '../../x' has a name that no model uses"),
        (put("x", torch.ones(0, 5)), "tensor 'x' has shape [0, 5]"),
    ],
)
def test_wrong_tensors_are_named(opt: Sample, full: Path, change: Change, reason: str) -> None:
    change_tensors(full, change)
    assert reason in rejection(full, opt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken(opt: Sample, full: Path, dtype: torch.dtype) -> None:
    change_tensors(full, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    assert inspect_adapter(full, opt.bundle.manifest).tensors[FULL].dtype == dtype


def test_duplicate_header_keys_are_refused(opt: Sample, full: Path) -> None:
    path = full / "adapter.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    first = re.match(r'\{("__metadata__":\{[^}]*\},)?("[^"]+":\{[^}]*\})', header)
    assert first is not None
    header = f"{header[:-1]},{first[2]}}}"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])
    relist(full)
    assert "stands twice" in rejection(full, opt)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.pkl", "modeling.py", "x.so", "noname"])
def test_pickled_files_and_code_are_never_opened(
    opt: Sample, lora: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (lora / name).write_bytes(pickle.dumps(Bomb()))
    assert f"{name} is pickled, code or of an unknown kind" in rejection(lora, opt)
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_instead_of_safetensors(opt: Sample, lora: Path) -> None:
    weights = lora / "adapter_model.safetensors"
    torch.save(load_file(weights), lora / "adapter_model.bin")
    weights.unlink()
    text = (lora / "manifest.json").read_text().replace("adapter_model.safetensors", "adapter_model.bin")
    (lora / "manifest.json").write_text(text)
    assert "adapter_model.bin is pickled" in rejection(lora, opt)


def test_pickle_under_a_harmless_name(opt: Sample, full: Path) -> None:
    torch.save({"x": torch.ones(2)}, full / "adapter.safetensors")
    relist(full)
    assert "no safetensors file" in rejection(full, opt)


def test_files_outside_the_list(opt: Sample, full: Path) -> None:
    (full / "README.md").write_text("hello")
    assert "README.md is not in the manifest" in rejection(full, opt)
    manifest = AdapterManifest.model_validate_json((full / "manifest.json").read_bytes())
    relist(full, files=describe_files(full, [*manifest.files, "README.md"]))
    assert "files lists README.md, adapter.safetensors" in rejection(full, opt)


def test_links_are_not_followed(opt: Sample, full: Path, tmp_path: Path) -> None:
    shutil.move(full / "adapter.safetensors", tmp_path / "elsewhere")
    (full / "adapter.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "adapter.safetensors is a link" in rejection(full, opt)


def test_changed_byte_names_the_file(opt: Sample, full: Path) -> None:
    flip(full / "adapter.safetensors", at=1)
    assert "adapter.safetensors was changed" in rejection(full, opt)


def test_missing_files(opt: Sample, full: Path, lora: Path, tmp_path: Path) -> None:
    (lora / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in rejection(lora, opt)
    (full / "manifest.json").unlink()
    assert "manifest.json is missing" in rejection(full, opt)
    with pytest.raises(NotFoundError):
        inspect_adapter(tmp_path / "nowhere", opt.bundle.manifest)


def test_too_large_is_not_even_parsed(opt: Sample, full: Path) -> None:
    (full / "manifest.json").write_text("{")
    reasons = rejection(full, opt, InspectionLimits(max_bytes=1000))
    assert "at most 1000 are taken" in reasons
    assert "JSON" not in reasons


def test_adapter_of_another_bundle_names_both(sample: Callable[[str], Sample], full: Path) -> None:
    ours, theirs = sample("llama").bundle.manifest, sample("opt").bundle.manifest
    assert f"belongs to bundle {theirs.bundle_id}, not to {ours.bundle_id}" in rejection(full, sample("llama"))


def test_method_that_the_owner_does_not_take(opt: Sample, full: Path) -> None:
    bundle = opt.bundle.manifest.model_copy(update={"methods": ("lora",)})
    with pytest.raises(AdapterRejectedError, match="method is 'full'; the bundle takes lora"):
        inspect_adapter(full, bundle)


def test_false_name_of_the_model(opt: Sample, full: Path) -> None:
    relist(full, version="2")
    assert "model and version are tiny-opt and 2" in rejection(full, opt)


def test_malformed_manifests(opt: Sample, full: Path) -> None:
    path = full / "manifest.json"
    values = json.loads(path.read_text())
    for changes, reason in (
        ({"extra": 1}, "unknown key extra"),
        ({"steps": "7"}, "steps is '7'"),
        ({"method": "pickle"}, "method is 'pickle'"),
        ({"files": {"../x.json": values["files"]["adapter.safetensors"]}}, "files.../x.json"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        assert reason in rejection(full, opt)


def test_every_reason_is_listed(opt: Sample, lora: Path) -> None:
    (lora / "x.pkl").write_text("")
    change_tensors(lora, put(LORA, torch.ones(2, 2)))
    change_config(lora, use_dora=True, auto_mapping={"base_model_class": "os.system"})
    relist(lora, bundle_id="other-1-000000000000")
    reasons = rejection(lora, opt)
    for reason in ("x.pkl", "use_dora", "auto_mapping", "other-1-000000000000"):
        assert reason in reasons


def test_long_lists_are_cut(opt: Sample, full: Path) -> None:
    change_tensors(full, lambda tensors: tensors.update({f"x{i}": torch.ones(1) for i in range(100)}))
    reasons = rejection(full, opt)
    assert "and 80 more of this kind" in reasons
    assert len(reasons) < 3000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping"),
        ({"custom_modules": {}}, "unknown key custom_modules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"fc1": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"fc1": 2}}, "alpha_pattern"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"megatron_core": "os.path"}, "megatron_core is 'os.path'"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ({"target_modules": ["fc1", "embed_tokens"]}, "target_modules names 'embed_tokens'"),
        ({"target_modules": [".*"]}, "target_modules.0 is '.*'"),
        ({"target_modules": ["fc1"]}, "is not part of the adapter"),
        ({"layers_to_transform": [0]}, "the adapter layers are [0, 3]"),
        ({"layers_to_transform": [0, 1, 2, 3]}, "the adapter layers are [0, 3]"),
        ({"layers_to_transform": None}, "layers_to_transform is 'None'"),
        ({"layers_pattern": "h"}, "layers_pattern is 'h'"),
        ({"fan_in_fan_out": True}, "for opt use False"),
        ({"r": 4}, "has shape (3, 32), not (4, 32)"),
        ({"r": 0}, "r is '0'"),
        ({"r": "3"}, "r is '3'"),
        ({"lora_alpha": -1}, "lora_alpha is '-1'"),
        ({"lora_alpha": None}, "lora_alpha is 'None'"),
    ],
)
def test_lora_configs_that_are_not_plain(opt: Sample, lora: Path, changes: dict[str, Any], reason: str) -> None:
    change_config(lora, **changes)
    assert reason in rejection(lora, opt)


def test_rank_is_bounded(opt: Sample, lora: Path) -> None:
    assert "r is 3; use at most 2" in rejection(lora, opt, InspectionLimits(max_rank=2))


def test_infinite_alpha_is_refused(opt: Sample, lora: Path) -> None:
    path = lora / "adapter_config.json"
    path.write_text(re.sub(r'"lora_alpha": [0-9.]+', '"lora_alpha": 1e999', path.read_text()))
    relist(lora)
    assert "lora_alpha" in rejection(lora, opt)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil(LORA, float("nan"), 2), f"tensor {LORA} holds 2 values"),
        (put(LORA, lambda t: t.T.contiguous()), f"tensor {LORA} has shape (32, 3), not (3, 32)"),
        (lambda tensors: tensors.pop(LORA), f"tensor {LORA} is missing"),
        (put(LORA.replace("0", "1"), torch.ones(3, 32)), "is not part of the adapter"),
    ],
)
def test_wrong_lora_tensors_are_named(opt: Sample, lora: Path, change: Change, reason: str) -> None:
    change_tensors(lora, change)
    assert reason in rejection(lora, opt)


def test_lora_on_some_maps_leaves_the_others(opt: Sample, lora: Path) -> None:
    change_tensors(lora, lambda t: [t.pop(name) for name in list(t) if "q_proj" not in name])  # type: ignore[arg-type]
    change_config(lora, target_modules=["self_attn.q_proj"])
    original = adapter_state(opt.full, PLAN)
    state = plain_state(inspect_adapter(lora, opt.bundle.manifest), original)
    changed = {name for name in state if not torch.equal(state[name], original[name])}
    assert changed == {f"layers.{i}.self_attn.q_proj.weight" for i in (0, 3)}


def test_values_that_overflow_once_merged(opt: Sample, full: Path, lora: Path) -> None:
    change_tensors(full, spoil(FULL, 1e30))
    half = {name: tensor.half() for name, tensor in adapter_state(opt.full, PLAN).items()}
    with pytest.raises(AdapterRejectedError, match=r"not finite once merged.*layers\.0\.fc1\.weight"):
        plain_state(inspect_adapter(full, opt.bundle.manifest), half)
    change_config(lora, lora_alpha=1e300)
    with pytest.raises(AdapterRejectedError, match="not finite once merged"):
        plain_state(inspect_adapter(lora, opt.bundle.manifest), adapter_state(opt.full, PLAN))


def test_original_of_another_model(opt: Sample, sample: Callable[[str], Sample], sent: Path) -> None:
    found = inspect_adapter(sent / "full", opt.bundle.manifest)
    with pytest.raises(ArtifactError, match="is not the adapter of bundle"):
        plain_state(found, adapter_state(sample("llama").full, PLAN))


def test_the_original_is_left_as_it_was(opt: Sample, sent: Path) -> None:
    original = adapter_state(opt.full, PLAN)
    before = {name: tensor.clone() for name, tensor in original.items()}
    for method in METHODS:
        state = plain_state(inspect_adapter(sent / method, opt.bundle.manifest), original)
        for tensor in state.values():
            tensor.zero_()
    assert all(torch.equal(before[name], original[name]) for name in before)
