"""Packed linear maps against plain numpy, and models with packed emulator layers against models without."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ot_ray.errors import ArtifactError, SplitError, UnsupportedModelError
from ot_ray.model import (
    DistillLoss,
    DistillModel,
    EmulatorConfig,
    PackedFormat,
    PackedLinear,
    SplitPlan,
    auto_class,
    compress,
    emulate,
    load_emulator,
)
from ot_ray.model.choice import smaller_layers
from ot_ray.model.families import layers_of
from ot_ray.model.packed import with_smaller_layers
from ot_ray.model.packed.codes import pack, packed_bytes, unpack
from ot_ray.model.packed.rounding import kept_mask, prune, quantize, rounded
from tests.fixtures.models import images, tiny_model, tokens

PLAN = SplitPlan(bottom=2, keep=2, top=1)
KEPT = [0, 2]
WAYS = {
    "quantized": EmulatorConfig(bits=4),
    "pruned": EmulatorConfig(sparsity=0.75),
    "both": EmulatorConfig(sparsity=0.5, bits=3, group_size=24),
}


def _weight(rows: int = 24, columns: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _format(config: EmulatorConfig) -> PackedFormat:
    return PackedFormat(
        first_layer=0, layers=1, sparsity=config.sparsity, bits=config.bits, group_size=config.group_size
    )


def _reference(weight: np.ndarray, config: EmulatorConfig) -> np.ndarray:
    """What compressing makes of a weight [out, in], entry by entry."""
    found = weight.astype(np.float32).copy()
    order = np.argsort(-np.abs(found).reshape(-1), kind="stable")
    found.reshape(-1)[order[found.size - int(config.sparsity * found.size) :]] = 0
    for row in found if config.bits else ():
        for start in range(0, len(row), config.group_size):
            group = row[start : start + config.group_size]
            levels = np.float32(2**config.bits - 1)
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            scale = high / levels - low / levels or np.float32(1)
            zero = np.rint(-low / scale)
            codes = np.clip(np.rint(group / scale) + zero, 0, levels)
            group[:] = (codes - zero) * scale
    return found


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 65, 1000])
def test_codes_come_back_from_as_many_bits_as_they_have(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(count, bits) == -(-count // 8) * bits
    assert torch.equal(unpack(packed, bits, count), codes)
    # Every bit of every code is stored: the ones are as many.
    assert np.unpackbits(packed.numpy()).sum() == np.unpackbits(codes.numpy()).sum()


@pytest.mark.parametrize("config", [*WAYS.values(), EmulatorConfig(bits=8, group_size=8), EmulatorConfig(bits=2)])
def test_the_dense_weight_is_that_of_an_independent_formula(config):
    weight = _weight()
    packed = PackedLinear.of(weight, None, _format(config))
    assert np.array_equal(packed.dense().numpy(), _reference(weight.numpy(), config))


def test_pruning_takes_the_smallest_and_exactly_as_many_as_asked():
    weight = torch.tensor([[3.0, -1.0, 1.0, -5.0], [1.0, 2.0, -1.0, 0.5]])
    assert prune(weight, 0.5).tolist() == [[3.0, -1.0, 0.0, -5.0], [0.0, 2.0, 0.0, 0.0]]
    assert torch.equal(prune(weight, 0.0), weight)
    for sparsity in (0.1, 0.3, 0.99):
        assert int((~kept_mask(_weight(), sparsity)).sum()) == int(sparsity * 24 * 80)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_to_the_nearest_value(bits):
    weight = _weight()
    step = quantize(weight, bits, 16).scale.repeat_interleave(16, 1)
    # The ends of a group may be moved by half a step more, so that 0 is a value.
    assert ((rounded(weight, bits, 16) - weight).abs() <= step * 1.0001).all()
    inner = (rounded(weight, bits, 16) - weight).abs() <= step * 0.5001
    assert inner.float().mean() > 0.8


def test_groups_of_equal_weights_and_of_zeros_are_kept():
    weight = torch.cat([torch.zeros(2, 16), torch.full((2, 16), -3.0), torch.full((2, 16), 1e-42)])
    found = rounded(weight, 4, 16)
    assert torch.equal(found[:4], weight[:4]) and torch.isfinite(found).all()


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS.keys())
def test_gradients_flow_to_input_and_bias_and_to_no_weight(config):
    weight, bias = _weight(), _weight(1, 24, seed=2)[0]
    packed = PackedLinear.of(weight, bias, _format(config))
    packed.bias.requires_grad_(True)
    x, x_plain = (_weight(6, 80, seed=3).view(2, 3, 80).requires_grad_(True) for _ in range(2))
    bias = bias.clone().requires_grad_(True)
    ours, theirs = packed(x), F.linear(x_plain, torch.from_numpy(_reference(weight.numpy(), config)), bias)
    assert torch.equal(ours, theirs)
    grad = _weight(6, 24, seed=4).view(2, 3, 24)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed.bias.grad, bias.grad, rtol=1e-6, atol=1e-6)


def test_no_pass_keeps_a_dense_weight():
    packed = PackedLinear.of(_weight(256, 256), None, _format(EmulatorConfig(bits=4)))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        packed(_weight(2, 256).requires_grad_(True))
    assert not kept


def test_a_cast_of_the_model_leaves_the_scales_in_float32():
    packed = PackedLinear.of(_weight(), None, _format(WAYS["both"]))
    before, scale = packed.dense(), packed.group_scale.clone()
    for dtype in (torch.bfloat16, torch.float64):
        moved = nn.Sequential(copy.deepcopy(packed)).to(dtype)[0]
        assert moved.group_scale.dtype == torch.float32 and torch.equal(moved.group_scale, scale)
        assert torch.equal(moved.dense(), before) and moved(_weight(3, 80).to(dtype)).dtype == dtype
    assert nn.Sequential(copy.deepcopy(packed)).to("meta")[0].group_scale.is_meta


def test_a_model_that_passes_by_its_linear_maps_is_refused():
    model = tiny_model("bloom")
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    for config in (WAYS["quantized"], EmulatorConfig(attention_rank=0.25)):
        with pytest.raises(UnsupportedModelError, match="slow_but_exact to false"):
            compress(emulate(model, PLAN, KEPT), PLAN, config)
        with pytest.raises(UnsupportedModelError, match="slow_but_exact to false"):
            DistillModel(copy.deepcopy(model), PLAN, KEPT, DistillLoss(), emulator=config)
    DistillModel(model, PLAN, KEPT, DistillLoss())


def test_it_follows_autocast():
    packed, x = PackedLinear.of(_weight(), None, _format(EmulatorConfig(bits=4))), _weight(3, 80).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
        plain = F.linear(x, packed.dense())
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_a_weight_that_is_not_finite_is_named():
    weight = _weight()
    weight[1, 1] = float("nan")
    with pytest.raises(SplitError, match=r"2\.fc1\.weight holds NaN or infinity"):
        PackedLinear.of(weight, None, _format(EmulatorConfig(bits=4)), "2.fc1.weight")
    model = emulate(tiny_model("opt"), PLAN, KEPT)
    layers_of(model)[2].fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(SplitError, match=r"2\.fc1\.weight"):
        compress(model, PLAN, WAYS["pruned"])


@pytest.mark.parametrize(
    ("config", "most"),
    [
        # A byte and four for each group of 64 four-bit weights: (32 + 5) / 256.
        (EmulatorConfig(bits=4), 0.145),
        (EmulatorConfig(bits=8, group_size=128), 0.26),
        # Of each weight a bit, of each fourth its 32.
        (EmulatorConfig(sparsity=0.75), 0.2815),
        (EmulatorConfig(sparsity=0.75, bits=4), 0.083),
    ],
)
def test_memory_is_a_fraction_of_float32(config, most):
    packed = PackedLinear.of(_weight(256, 512), None, _format(config))
    bytes_ = sum(tensor.nbytes for tensor in (*packed.parameters(), *packed.buffers()))
    assert bytes_ <= most * 256 * 512 * 4


def _by_hand(model: PreTrainedModel, config: EmulatorConfig) -> PreTrainedModel:
    """The emulator layers' weights replaced by what the independent formula makes of them."""
    for layer in list(layers_of(model))[2:4]:
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D):
                weight = module.weight.data
                turned = weight.t() if isinstance(module, Conv1D) else weight
                found = torch.from_numpy(_reference(np.ascontiguousarray(turned.numpy()), config))
                weight.copy_(found.t() if isinstance(module, Conv1D) else found)
    return model


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS.keys())
def test_a_compressed_model_computes_with_the_compressed_weights(family_model, config, tmp_path):
    ids = tokens()
    expected = _by_hand(emulate(family_model, PLAN, KEPT), config)(ids).logits
    model = compress(emulate(family_model, PLAN, KEPT), PLAN, config)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    _check_saved(model, {"input_ids": ids}, tmp_path)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_image_models_are_compressed_too(image_model, tmp_path):
    pixels = images()
    expected = _by_hand(emulate(image_model, PLAN, KEPT), WAYS["both"])(pixel_values=pixels).logits
    model = compress(emulate(image_model, PLAN, KEPT), PLAN, WAYS["both"])
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)
    _check_saved(model, {"pixel_values": pixels}, tmp_path)


def _check_saved(model: PreTrainedModel, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    """What Transformers opens is the model, bit by bit; every tensor, and what the model says."""
    model.save_pretrained(folder)
    opened = auto_class(model.config.model_type).from_pretrained(folder, local_files_only=True)
    assert opened.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in opened.state_dict().items())
    assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    packed = [name for name, module in opened.named_modules() if isinstance(module, PackedLinear)]
    assert packed and packed == [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def test_what_does_not_compress_changes_nothing():
    model = emulate(tiny_model("opt"), PLAN, KEPT)
    before = model.state_dict()
    assert compress(model, PLAN, EmulatorConfig()) is model
    assert model.state_dict().keys() == before.keys() and not hasattr(model.config, "quantization_config")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed")
    compress(emulate(tiny_model("llama"), PLAN, KEPT), PLAN, WAYS["both"]).save_pretrained(place)
    return place


def test_scales_stay_float32_in_a_bfloat16_model(folder):
    exact = auto_class("llama").from_pretrained(folder, local_files_only=True)
    coarse = auto_class("llama").from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16)
    for (name, module), (_, other) in zip(exact.named_modules(), coarse.named_modules(), strict=True):
        if isinstance(module, PackedLinear):
            assert isinstance(other, PackedLinear) and other.group_scale.dtype == torch.float32
            assert torch.equal(module.dense(), other.dense()), name
    assert coarse(tokens()).logits.dtype == torch.bfloat16


_ALONE = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except RuntimeError as error:
        print(type(error).__name__, "mismatch" in str(error))
    else:
        print("opened", folder)
"""


@pytest.mark.slow
def test_transformers_alone_takes_no_emulator_of_ours_for_weights(folder, tmp_path):
    """It fails; a model with weights made up in the emulator's place would be worse."""
    folders = [folder]
    for model_type in ("llama", "gpt2", "bloom"):
        for share in ("attention_rank", "mlp_channels"):
            config, full = EmulatorConfig.model_validate({share: 0.25}), tiny_model(model_type)
            state = smaller_layers(full, PLAN, KEPT, config, [{"input_ids": tokens(), "labels": tokens()}])
            smaller = with_smaller_layers(emulate(full, PLAN, KEPT), PLAN, config)
            load_emulator(smaller, PLAN, state)
            folders.append(tmp_path / f"{model_type}-{share}")
            compress(smaller, PLAN, config).save_pretrained(folders[-1])
    environment, command = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, "-c", _ALONE, *map(str, folders)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert ended.stdout.splitlines() == ["RuntimeError True"] * len(folders), ended.stderr
    assert ended.stderr.count("Unknown quantization type, got ot_ray") >= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 9}, r"bits is 9"),
        ({"sparsity": 1.0}, r"sparsity is 1\.0"),
        ({"format_version": 2}, "format_version is 2"),
        ({"code": "x.py"}, "code is 'x.py'"),
        ({"first_layer": 4}, "layers up to 5, but the model has 5"),
    ],
)
def test_a_format_that_cannot_be_opened_is_refused(folder, tmp_path, change, reason):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=reason):
        auto_class("llama").from_pretrained(tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("values", "field"),
    [({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"sparsity": 1.0}, "sparsity"), ({"sparsity": -0.1}, "sparsity")],
)
def test_settings_out_of_range_are_refused(values, field):
    with pytest.raises(ValueError, match=field):
        EmulatorConfig.model_validate(values)
