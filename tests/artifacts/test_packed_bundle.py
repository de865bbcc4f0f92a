"""Bundles whose emulator is pruned and quantized: small on disk and in memory, tuned and returned like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ot_ray.artifacts import inspect_adapter, open_bundle, plain_state, write_bundle
from ot_ray.artifacts.manifest import MANIFEST, BundleManifest, bundle_id, to_text
from ot_ray.artifacts.safetensors_header import read_header
from ot_ray.errors import ArtifactError, SignatureError
from ot_ray.model import METHODS, EmulatorConfig, PackedLinear, adapter_state, compress, emulate, plug_in
from ot_ray.model.families import layers_of
from tests.artifacts.samples import DEPTH, KEPT, PLAN, Sample, flip, returned
from tests.fixtures.models import SHAPES, tiny_model, tokens

WAYS = {
    "four bits": (EmulatorConfig(bits=4), 0.2),
    "three quarters pruned": (EmulatorConfig(sparsity=0.75), 0.3),
    "both": (EmulatorConfig(sparsity=0.75, bits=4), 0.1),
}
WIDE = {"hidden_size": 128, "ffn_dim": 512}
"""Wide enough that biases and norms are few beside the maps."""


def _packed(place: Path, keys: tuple[Path, Path], config: EmulatorConfig, model_type: str = "opt") -> Sample:
    full = tiny_model(model_type, DEPTH)
    emulated = compress(emulate(full, PLAN, KEPT), PLAN, config)
    write_bundle(
        place,
        emulated,
        None,
        PLAN,
        name="packed",
        version="1",
        card="# Packed\n",
        recommended={},
        private_key=keys[0],
    )
    return Sample(full, emulated, open_bundle(place, keys[1]))


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS.keys())
def way(request: pytest.FixtureRequest) -> tuple[EmulatorConfig, float]:
    return request.param


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path], way: Any) -> Sample:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "opt", {**SHAPES["opt"], **WIDE, "word_embed_proj_dim": 128})
        return _packed(tmp_path_factory.mktemp("packed") / "bundle", keys, way[0])


def _emulator_bytes(layers: Any) -> int:
    chosen = list(layers)[PLAN.bottom : PLAN.bottom + PLAN.keep]
    return sum(tensor.nbytes for layer in chosen for tensor in (*layer.parameters(), *layer.buffers()))


def _stored_bytes(folder: Path) -> int:
    """Of the emulator layers, as the file itself says."""
    prefixes = tuple(f"model.decoder.layers.{PLAN.bottom + place}." for place in range(PLAN.keep))
    header = read_header(folder / "emulator.safetensors")
    return sum(entry.end - entry.start for name, entry in header.items() if name.startswith(prefixes))


def test_it_is_small_on_disk_and_as_small_in_memory(packed, way):
    dense = _emulator_bytes(layers_of(emulate(packed.full, PLAN, KEPT)))
    stored = _stored_bytes(packed.bundle.folder)
    assert stored <= way[1] * dense
    opened = packed.bundle.load_model()
    assert _emulator_bytes(layers_of(opened)) == pytest.approx(stored, rel=0.1)
    # Passing through does not unpack it for good.
    opened(tokens())
    assert _emulator_bytes(layers_of(opened)) == pytest.approx(stored, rel=0.1)


def test_it_opens_as_what_was_written(packed):
    opened = packed.bundle.load_model()
    with torch.no_grad():
        assert torch.equal(opened(tokens()).logits, packed.emulated(tokens()).logits)
        assert opened.generate(tokens(), max_new_tokens=4, do_sample=False).shape == (2, 16)
    assert not opened.training
    assert packed.bundle.load_model(torch.bfloat16)(tokens()).logits.dtype == torch.bfloat16


def test_only_the_emulator_holds_bytes(packed, way):
    with safe_open(packed.bundle.folder / "adapter.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    header = read_header(packed.bundle.folder / "emulator.safetensors")
    # Layers start at a place of their own: biases and norms of the emulator are as they were.
    kinds = {name.rpartition(".")[2]: entry.dtype for name, entry in header.items() if ".fc1." in name}
    expected = {"weight": "F32" if way[0].bits is None else "U8", "bias": "F32"}
    expected |= {"mask": "U8"} if way[0].sparsity else {}
    expected |= {"group_scale": "F32", "group_zero": "U8"} if way[0].bits else {}
    assert kinds == expected
    config = json.loads((packed.bundle.folder / "config.json").read_text())["quantization_config"]
    assert {name: value for name, value in config.items() if value is not None or name == "bits"} == {
        "quant_method": "ot_ray",
        "format_version": 1,
        "first_layer": PLAN.bottom,
        "layers": PLAN.keep,
        "sparsity": way[0].sparsity,
        "bits": way[0].bits,
        "group_size": 64,
    }


@pytest.mark.parametrize("method", METHODS)
def test_its_adapter_is_tuned_returned_and_plugged_in(packed, tmp_path, method):
    folder, tuned = returned(packed, tmp_path / "adapter", method)
    state = plain_state(inspect_adapter(folder, packed.bundle.manifest), adapter_state(packed.full, PLAN))
    plugged = plug_in(packed.full, PLAN, state)
    assert not torch.equal(plugged(tokens()).logits, packed.full(tokens()).logits)
    # The tuned adapter on the packed emulator, as it is evaluated.
    beside = plug_in(packed.bundle.load_model(), PLAN, state)
    torch.testing.assert_close(beside(tokens()).logits, tuned(tokens()).logits, rtol=1e-4, atol=1e-4)
    loss = tuned(tokens(), labels=tokens()).loss
    loss.backward()
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    packed_maps = [module for module in tuned.modules() if isinstance(module, PackedLinear)]
    assert packed_maps and not any(p.requires_grad for module in packed_maps for p in module.parameters())


def test_gpt2_with_its_turned_maps(tmp_path, keys):
    gpt2 = _packed(tmp_path / "bundle", keys, EmulatorConfig(sparsity=0.5, bits=4), "gpt2")
    with torch.no_grad():
        assert torch.equal(gpt2.bundle.load_model()(tokens()).logits, gpt2.emulated(tokens()).logits)


def test_a_changed_bit_is_found(packed, keys, tmp_path):
    folder = shutil.copytree(packed.bundle.folder, tmp_path / "bundle")
    flip(folder / "emulator.safetensors")
    with pytest.raises((ArtifactError, SignatureError), match=r"emulator\.safetensors"):
        open_bundle(folder, keys[1])


@pytest.mark.parametrize("place", ["config.json", "text_config"])
def test_another_quantization_method_is_refused(packed, tmp_path, place):
    folder = shutil.copytree(packed.bundle.folder, tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text())
    # Transformers falls back to a text config's.
    part = config if place == "config.json" else config.setdefault(place, {})
    part["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    _relist(folder)
    with pytest.raises(ArtifactError, match="quantization_config names another method than 'ot_ray'"):
        open_bundle(folder)


def _relist(folder: Path) -> None:
    """A manifest that fits the changed files, as whoever changed them would write it."""
    from ot_ray.artifacts.folder import describe_files, list_files

    manifest = BundleManifest.model_validate_json((folder / MANIFEST).read_bytes())
    files = describe_files(folder, [name for name in list_files(folder)[0] if name in manifest.files])
    named = bundle_id(manifest.model, manifest.version, files)
    (folder / MANIFEST).write_bytes(to_text(manifest.model_copy(update={"files": files, "bundle_id": named})))


def test_a_packed_adapter_is_refused(tmp_path):
    model = compress(emulate(tiny_model("opt", DEPTH), PLAN, KEPT), PLAN, EmulatorConfig(bits=4))
    layers = layers_of(model)
    layers[0] = layers[1]
    with pytest.raises(ArtifactError, match=r"layers\.0\..* is of torch\.uint8"):
        write_bundle(tmp_path / "b", model, None, PLAN, name="m", version="1", card="", recommended={})
