"""Hostile adapters of the methods `bottleneck` and `bitfit`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ot_ray.artifacts import InspectionLimits, inspect_adapter, plain_state
from ot_ray.errors import AdapterRejectedError
from ot_ray.model import adapter_state
from tests.artifacts.hostile import Change, change_tensors, put, rejection, relist, spoil
from tests.artifacts.samples import PLAN, Sample, returned

DOWN = "model.decoder.layers.3.fc2.bottleneck.down.weight"
BIAS = "model.decoder.layers.0.fc1.bias"
MATRIX = "model.decoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def sent(sample: Callable[[str], Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each method, which tests copy."""
    place = tmp_path_factory.mktemp("sent")
    for method in ("full", "bottleneck", "bitfit"):
        returned(sample("opt"), place / method, method)
    return place


@pytest.fixture
def bottleneck(sent: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sent / "bottleneck", tmp_path / "bottleneck")


@pytest.fixture
def bitfit(sent: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sent / "bitfit", tmp_path / "bitfit")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil(DOWN, float("nan"), 3), f"tensor {DOWN} holds 3 values that are not finite"),
        (put(DOWN, lambda t: t.T.contiguous()), f"tensor {DOWN} has shape (32, 5), not (5, 32)"),
        (put(DOWN, lambda t: t.double()), f"tensor {DOWN} has dtype F64"),
        (lambda tensors: tensors.pop(DOWN), f"tensor {DOWN} is missing"),
        (put(MATRIX, torch.ones(48, 32)), f"tensor {MATRIX} is not part of the adapter"),
        (put(DOWN.replace("3", "1"), torch.ones(5, 32)), f"tensor {DOWN.replace('3', '1')} is not part"),
        (put(DOWN.replace("fc2", "fc1"), torch.ones(5, 48)), "fc1.bottleneck.down.weight is not part"),
        (put("lm_head.bottleneck.down.weight", torch.ones(5, 32)), "lm_head.bottleneck.down.weight is not part"),
        # One bottleneck of another size than the manifest says, all of it consistent in itself.
        (
            lambda tensors: tensors.update(
                {
                    DOWN: torch.ones(7, 32),
                    DOWN.replace("weight", "bias"): torch.ones(7),
                    DOWN.replace("down", "up"): torch.ones(32, 7),
                }
            ),
            f"tensor {DOWN} has shape (7, 32), not (5, 32)",
        ),
    ],
)
def test_wrong_bottleneck_tensors_are_named(opt: Sample, bottleneck: Path, change: Change, reason: str) -> None:
    change_tensors(bottleneck, change)
    assert reason in rejection(bottleneck, opt)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil(BIAS, float("inf")), f"tensor {BIAS} holds 1 values that are not finite"),
        (put(BIAS, lambda t: t[:-1].clone()), f"tensor {BIAS} has shape (47,), not (48,)"),
        (lambda tensors: tensors.pop(BIAS), f"tensor {BIAS} is missing"),
        (put(MATRIX, torch.ones(48, 32)), f"tensor {MATRIX} is not part of the adapter"),
        (put(BIAS.replace("0", "1"), torch.ones(48)), f"tensor {BIAS.replace('0', '1')} is not part"),
        (put(DOWN, torch.ones(5, 32)), f"tensor {DOWN} is not part of the adapter"),
        (put("lm_head.bias", torch.ones(96)), "tensor lm_head.bias is not part of the adapter"),
    ],
)
def test_wrong_vectors_are_named(opt: Sample, bitfit: Path, change: Change, reason: str) -> None:
    change_tensors(bitfit, change)
    assert reason in rejection(bitfit, opt)


def test_the_size_is_bounded_and_belongs_to_the_tensors(opt: Sample, bottleneck: Path) -> None:
    assert "bottleneck is 5; use at most 4" in rejection(bottleneck, opt, InspectionLimits(max_bottleneck=4))
    relist(bottleneck, bottleneck=4)
    assert f"tensor {DOWN} has shape (5, 32), not (4, 32)" in rejection(bottleneck, opt)
    relist(bottleneck, bottleneck=10**12)
    assert "bottleneck is 1000000000000; use at most 1024" in rejection(bottleneck, opt)
    relist(bottleneck, bottleneck=None)
    assert "bottleneck is missing" in rejection(bottleneck, opt)


@pytest.mark.parametrize("size", [0, -1, "5", 5.5, True])
def test_sizes_that_are_no_number_of_values(opt: Sample, bottleneck: Path, size: object) -> None:
    path = bottleneck / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bottleneck": size}))
    assert f"bottleneck is {str(size)!r}" in rejection(bottleneck, opt)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_a_size_without_bottlenecks_is_refused(opt: Sample, sent: Path, tmp_path: Path, method: str) -> None:
    folder = shutil.copytree(sent / method, tmp_path / method)
    relist(folder, bottleneck=5)
    assert f"bottleneck is 5, but method is {method!r}, which has none" in rejection(folder, opt)


@pytest.mark.parametrize(
    ("sent_as", "said", "reason"),
    [
        ("bottleneck", "full", f"tensor {BIAS} is missing"),
        ("bottleneck", "bitfit", "fc2.bottleneck.up.weight is not part of the adapter"),
        ("bitfit", "full", f"tensor {MATRIX} is missing"),
        ("full", "bitfit", f"tensor {MATRIX} is not part of the adapter"),
        ("full", "bottleneck", "bottleneck is missing"),
        ("bitfit", "lora", "the files of lora are adapter_config.json"),
    ],
)
def test_another_method_than_the_manifest_says(
    opt: Sample, sent: Path, tmp_path: Path, sent_as: str, said: str, reason: str
) -> None:
    folder = shutil.copytree(sent / sent_as, tmp_path / sent_as)
    relist(folder, method=said, bottleneck=None)
    assert reason in rejection(folder, opt)


@pytest.mark.parametrize("method", ["bottleneck", "bitfit"])
def test_an_owner_who_does_not_take_the_method(opt: Sample, sent: Path, method: str) -> None:
    bundle = opt.bundle.manifest.model_copy(update={"methods": ("full", "lora")})
    with pytest.raises(AdapterRejectedError, match=f"method is {method!r}; the bundle takes full, lora"):
        inspect_adapter(sent / method, bundle)


def test_a_manifest_from_before_there_were_bottlenecks(opt: Sample, sent: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sent / "full", tmp_path / "full")
    values = json.loads((folder / "manifest.json").read_text())
    assert "bottleneck" not in values
    (folder / "manifest.json").write_text(json.dumps(values))
    assert inspect_adapter(folder, opt.bundle.manifest).manifest.bottleneck is None


def test_values_that_overflow_in_the_model_s_type(opt: Sample, bottleneck: Path, bitfit: Path) -> None:
    half = {name: tensor.half() for name, tensor in adapter_state(opt.full, PLAN).items()}
    for folder, name, short in (
        (bottleneck, DOWN, r"layers\.3\.fc2\.bottleneck\.down\.weight"),
        (bitfit, BIAS, r"layers\.0\.fc1\.bias"),
    ):
        change_tensors(folder, spoil(name, 1e30))
        found = inspect_adapter(folder, opt.bundle.manifest)
        with pytest.raises(AdapterRejectedError, match=f"not finite once merged.*{short}"):
            plain_state(found, half)
