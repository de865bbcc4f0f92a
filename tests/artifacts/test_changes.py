from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ot_ray.artifacts import (
    ChangeLimits,
    inspect_adapter,
    measure_changes,
    plain_state,
    published_adapter,
    require_sane_changes,
    write_adapter,
)
from ot_ray.artifacts.publication import publish_bundle
from ot_ray.errors import AdapterRejectedError
from ot_ray.model import METHODS, BottleneckSettings, LoraSettings, Method, adapter_state, prepare_tuning
from ot_ray.store import LocalStore
from tests.artifacts.hostile import change_tensors
from tests.artifacts.samples import PLAN, Sample
from tests.fixtures.models import tokens

State = dict[str, torch.Tensor]
MATRIX, BIAS, NORM = "layers.0.fc1.weight", "layers.0.fc1.bias", "layers.3.final_layer_norm.weight"
RATES: dict[Method, float] = {"full": 5e-4, "lora": 2e-3, "bottleneck": 2e-3, "bitfit": 5e-3}


def tuned(sample: Sample, method: Method, folder: Path, steps: int = 6) -> Path:
    """An adapter that was really tuned, at a usual rate. The models are untrained, so that it moves far."""
    torch.manual_seed(0)
    model = prepare_tuning(sample.bundle.load_model(), PLAN, method, LoraSettings(rank=4), BottleneckSettings(size=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES[method])
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write_adapter(folder, model.eval(), sample.bundle.manifest, method=method, steps=steps, learning_rate=RATES[method])
    return folder


def merged(sample: Sample, folder: Path) -> tuple[State, State]:
    original = adapter_state(sample.full, PLAN)
    return plain_state(inspect_adapter(folder, sample.bundle.manifest), original), original


def reasons(sample: Sample, state: State, limits: ChangeLimits | None = None) -> tuple[str, ...]:
    with pytest.raises(AdapterRejectedError) as caught:
        require_sane_changes(sample.bundle.manifest, state, adapter_state(sample.full, PLAN), limits)
    return caught.value.reasons


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["opt", "gpt2", "llama"])
def test_real_tuning_passes_with_a_wide_margin(
    sample: Callable[[str], Sample], model_type: str, method: Method, tmp_path: Path
) -> None:
    ours = sample(model_type)
    state, original = merged(ours, tuned(ours, method, tmp_path / "adapter"))
    figures = require_sane_changes(ours.bundle.manifest, state, original)
    limits = ChangeLimits()
    assert 0 < figures["change_norm"] < limits.max_relative_norm / 3
    assert 0 < figures["change_entry"] < limits.max_relative_entry / 3
    assert figures["change_direction"] < limits.max_relative_direction / 3


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_was_not_tuned_is_noticed(opt: Sample, method: Method, tmp_path: Path) -> None:
    state, _ = merged(opt, tuned(opt, method, tmp_path / "adapter", steps=0))
    (reason,) = reasons(opt, state)
    assert "it is unchanged" in reason


def test_figures_are_those_of_a_singular_value_decomposition(opt: Sample) -> None:
    original = adapter_state(opt.full, PLAN)
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(48, 1, generator=generator), torch.randn(1, 32, generator=generator)
    move = 0.01 * left @ right + 0.002 * torch.randn(48, 32, generator=generator)
    state = {**original, MATRIX: original[MATRIX] + move}
    (found,) = measure_changes(opt.bundle.manifest, state, original)
    change, weight = (state[MATRIX] - original[MATRIX]).double(), original[MATRIX].double()
    singular, own = torch.linalg.svdvals(change), torch.linalg.svdvals(weight)
    assert found.name == MATRIX
    assert found.norm == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    assert found.entry == pytest.approx(float(change.abs().max() / weight.square().mean().sqrt()), rel=1e-5)
    # Power iteration gives a lower bound, which is near where one value stands out.
    assert found.share == pytest.approx(float(singular[0] ** 2 / singular.square().sum()), rel=1e-4)
    assert found.direction == pytest.approx(float(singular[0] / own[0]), rel=0.05)


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_a_bottleneck_is_measured_by_the_map_that_it_makes(
    sample: Callable[[str], Sample], model_type: str, tmp_path: Path
) -> None:
    ours = sample(model_type)
    state, original = merged(ours, tuned(ours, "bottleneck", tmp_path / "adapter"))
    host = "layers.0.fc2" if model_type == "opt" else "layers.0.mlp.c_proj"
    found = {change.name: change for change in measure_changes(ours.bundle.manifest, state, original)}
    weight = original[f"{host}.weight"].double()
    down, up = (state[f"{host}.bottleneck.{end}.weight"].double() for end in ("down", "up"))
    # How the outputs for every unit input move where the activation passes all: as a map from inputs to outputs.
    outputs = weight.T if model_type == "opt" else weight
    moved = outputs @ down.T @ up.T
    ours_norm = found[f"{host}.bottleneck.weight"].norm
    assert ours_norm == pytest.approx(float(moved.norm() / outputs.norm()), rel=1e-4)
    assert f"{host}.bottleneck.bias" in found


def spike(tensor: torch.Tensor, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(len(tensor), 1, generator=generator), torch.randn(1, tensor.shape[1], generator=generator)
    return tensor + size * tensor.norm() * left @ right / (left.norm() * right.norm())


def poke(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    poked = tensor.clone()
    poked.view(-1)[int(tensor.abs().argmax())] *= factor
    return poked


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (MATRIX, lambda t: poke(t, 1000), f"an entry of tensor {MATRIX} moved by"),
        (MATRIX, lambda t: t * 10, f"tensor {MATRIX} moved by 9 times the original's norm"),
        (MATRIX, lambda t: t * -10, f"tensor {MATRIX} moved by 11 times"),
        (MATRIX, lambda t: spike(t, 7.5), f"tensor {MATRIX} moved along one direction, which holds 100%"),
        (BIAS, lambda t: t + 100, f"tensor {BIAS} moved by"),
        (NORM, lambda t: t * 10, f"tensor {NORM} moved by 9 times"),
        (NORM, lambda t: poke(t, 1000), f"an entry of tensor {NORM} moved by"),
    ],
)
def test_what_no_tuning_does_is_refused(
    opt: Sample, name: str, change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    original = adapter_state(opt.full, PLAN)
    assert any(reason in found for found in reasons(opt, {**original, name: change(original[name])}))


@pytest.mark.parametrize(
    ("method", "end"),
    [("lora", "lora_A.weight"), ("lora", "lora_B.weight"), ("bottleneck", "up.weight"), ("bottleneck", "up.bias")],
)
def test_poked_factors_are_refused_once_merged(opt: Sample, method: Method, end: str, tmp_path: Path) -> None:
    folder = tuned(opt, method, tmp_path / "adapter")

    def scale(tensors: State) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name] = tensors[name] * 1000

    change_tensors(folder, scale)
    state, _ = merged(opt, folder)
    assert "times the original's" in reasons(opt, state)[0]


def test_every_tensor_that_moved_too_far_is_named(opt: Sample) -> None:
    original = adapter_state(opt.full, PLAN)
    found = reasons(opt, {name: tensor * 100 for name, tensor in original.items()})
    assert len(found) == 21
    assert found[-1].startswith("and ")
    assert all("at most 8" in reason or "at most 60" in reason for reason in found[:-1])


def test_limits_are_the_owner_s(opt: Sample) -> None:
    original = adapter_state(opt.full, PLAN)
    state = {**original, MATRIX: original[MATRIX] * 1.5}
    assert require_sane_changes(opt.bundle.manifest, state, original)["change_norm"] == pytest.approx(0.5)
    assert "at most 0.1 is taken" in reasons(opt, state, ChangeLimits(max_relative_norm=0.1))[0]


def test_a_tensor_that_was_zero_has_a_bound_too(opt: Sample) -> None:
    original = {name: torch.zeros_like(t) if name == MATRIX else t for name, t in adapter_state(opt.full, PLAN).items()}
    state = {**original, MATRIX: torch.full_like(original[MATRIX], 1000.0)}
    with pytest.raises(AdapterRejectedError, match=f"tensor {MATRIX} moved by"):
        require_sane_changes(opt.bundle.manifest, state, original)


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_the_published_adapter_is_the_model_s_own(
    sample: Callable[[str], Sample], model_type: str, tmp_path: Path
) -> None:
    ours, store = sample(model_type), LocalStore(tmp_path / "store")
    publish_bundle(store, ours.bundle.folder)
    found, wanted = published_adapter(store, ours.bundle.manifest), adapter_state(ours.full, PLAN)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
