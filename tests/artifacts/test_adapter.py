from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ot_ray.artifacts import inspect_adapter, plain_state, write_adapter
from ot_ray.errors import AlreadyExistsError, ArtifactError
from ot_ray.model import METHODS, adapter_state, merged_adapter_state, plug_in
from tests.artifacts.samples import PLAN, Sample, returned, tuned_model
from tests.fixtures.models import tokens


@pytest.mark.parametrize("method", METHODS)
def test_what_comes_back_plugs_in_as_what_was_tuned(family: Sample, tmp_path: Path, method: str) -> None:
    folder, tuned = returned(family, tmp_path / "a", method)
    original = adapter_state(family.full, PLAN)
    state = plain_state(inspect_adapter(folder, family.bundle.manifest), original)
    direct = merged_adapter_state(tuned, PLAN)  # type: ignore[arg-type]
    new = {name for name in state if ".bottleneck." in name}
    # Two bottlenecks of four tensors in each of the two adapter layers.
    assert len(new) == (16 if method == "bottleneck" else 0)
    assert state.keys() == direct.keys() == original.keys() | new
    assert new or any(not torch.equal(state[name], original[name]) for name in state)
    for name in state:
        assert torch.equal(state[name], direct[name]), name
    with torch.no_grad():
        ours = plug_in(family.full, PLAN, state)(tokens()).logits
        theirs = plug_in(family.full, PLAN, direct)(tokens()).logits
    assert torch.equal(ours, theirs)


def test_lora_opens_with_plain_peft_on_the_plain_model(family: Sample, tmp_path: Path) -> None:
    folder, tuned = returned(family, tmp_path / "a", "lora")
    base = AutoModelForCausalLM.from_pretrained(family.bundle.folder)
    with torch.no_grad():
        untuned = base.eval()(tokens()).logits
        loaded = PeftModel.from_pretrained(base, str(folder)).eval()
        logits = loaded(tokens()).logits
        assert torch.equal(logits, tuned(tokens()).logits)
        assert not torch.equal(logits, untuned)
        merged = loaded.merge_and_unload()  # type: ignore[operator]
    state = plain_state(inspect_adapter(folder, family.bundle.manifest), adapter_state(family.emulated, PLAN))
    for name, tensor in adapter_state(merged, PLAN).items():
        assert torch.equal(state[name], tensor), name


def test_files_and_manifest(opt: Sample, tmp_path: Path) -> None:
    folder, _ = returned(opt, tmp_path / "a", "full")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["bundle_id"] == opt.bundle.manifest.bundle_id
    assert (manifest["method"], manifest["steps"], manifest["validation_loss"]) == ("full", 7, 2.5)


def test_lora_names_no_path_of_the_tuner(opt: Sample, tmp_path: Path) -> None:
    folder, tuned = returned(opt, tmp_path / "a", "lora")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    for path in folder.glob("*.json"):
        assert str(opt.bundle.folder.parent) not in path.read_text()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("tiny-opt-1-")
    assert tuned.peft_config["default"].base_model_name_or_path == str(opt.bundle.folder)  # type: ignore[index]


def write(folder: Path, model: torch.nn.Module, sample: Sample, **changes: object) -> None:
    values = {"method": "full", "steps": 1, "learning_rate": 1e-4, **changes}
    write_adapter(folder, model, sample.bundle.manifest, **values)  # type: ignore[arg-type]


def test_what_cannot_return_is_not_written(opt: Sample, tmp_path: Path) -> None:
    full, lora = tuned_model(opt, "full"), tuned_model(opt, "lora")
    with pytest.raises(ArtifactError, match="use prepare_tuning"):
        write(tmp_path / "a", lora, opt)
    with pytest.raises(ArtifactError, match="use prepare_tuning"):
        write(tmp_path / "a", full, opt, method="lora")
    with pytest.raises(ArtifactError, match="method is 'ia3'"):
        write(tmp_path / "a", full, opt, method="ia3")
    with pytest.raises(ArtifactError, match=r"has gradients, but method 'bitfit' does not tune it.*left behind"):
        write(tmp_path / "a", full, opt, method="bitfit")
    with pytest.raises(ArtifactError, match=r"no bottleneck behind model\.decoder\.layers\.0\.self_attn\.out_proj"):
        write(tmp_path / "a", full, opt, method="bottleneck")
    for method in ("full", "bitfit"):
        with pytest.raises(ArtifactError, match="are not those of bundle"):
            write(tmp_path / "a", tuned_model(opt, "bottleneck"), opt, method=method)
    with pytest.raises(ArtifactError, match=r"has 11 layers, bundle .* has 4"):
        write(tmp_path / "a", opt.full, opt)
    with pytest.raises(ArtifactError, match="steps is -1"):
        write(tmp_path / "a", full, opt, steps=-1)
    with pytest.raises(ArtifactError, match="validation_loss is nan"):
        write(tmp_path / "a", full, opt, validation_loss=float("nan"))
    with pytest.raises(ArtifactError, match=r"torch\.float64"):
        write(tmp_path / "a", tuned_model(opt, "full").double(), opt)
    assert not list(tmp_path.iterdir())


def test_lora_under_another_name_is_refused(opt: Sample, tmp_path: Path) -> None:
    config = tuned_model(opt, "lora").peft_config["default"]  # type: ignore[index]
    model = get_peft_model(opt.bundle.load_model(), config, adapter_name="mine")
    with pytest.raises(ArtifactError, match="adapters mine, none named default"):
        write(tmp_path / "a", model, opt, method="lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_diverged_tuning_is_not_written(opt: Sample, tmp_path: Path, method: str) -> None:
    model = tuned_model(opt, method)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("inf")
    with pytest.raises(ArtifactError, match="not finite"):
        write(tmp_path / "a", model, opt, method=method)
    assert not list(tmp_path.iterdir())


def test_model_of_another_bundle_is_refused(opt: Sample, sample, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArtifactError, match="are not those of bundle"):
        write(tmp_path / "a", tuned_model(sample("llama"), "full"), opt)


def test_earlier_adapter_is_left_alone(opt: Sample, tmp_path: Path) -> None:
    folder, tuned = returned(opt, tmp_path / "a", "full")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(AlreadyExistsError, match="choose another folder"):
        write(folder, tuned, opt)
    assert (folder / "manifest.json").read_bytes() == before


def test_bfloat16_base_takes_float32_updates(opt: Sample, tmp_path: Path) -> None:
    folder, _ = returned(opt, tmp_path / "a", "full")
    original = {name: tensor.bfloat16() for name, tensor in adapter_state(opt.full, PLAN).items()}
    state = plain_state(inspect_adapter(folder, opt.bundle.manifest), original)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
