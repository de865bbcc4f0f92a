"""Layer choices: CKA and gradient distances against formulas of their own, and what is chosen against every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ot_ray.errors import DataError, SplitError, TrainingError
from ot_ray.model import EmulatorConfig, LanguageModel, SplitPlan, emulate, family_of, uniform_layers
from ot_ray.model.choice import CHOICES, choose_layers, gradient
from ot_ray.model.choice.cka import adjacent_clusters, linear_cka, middle_outputs
from ot_ray.model.choice.gradient import AdapterGradients
from ot_ray.model.families import IMAGE_FAMILIES, layers_of
from tests.fixtures.models import images, tiny_image_model, tiny_model, tokens

PLAN = SplitPlan(bottom=1, keep=3, top=1)
DEPTH, MIDDLE = 9, 7


def packed(
    rows: int = 2, seed: int = 1, lengths: tuple[int, ...] = (6, 8), padding: int = 2
) -> dict[str, torch.Tensor]:
    """Rows of several documents and padding, as `collate` makes them."""
    ids = tokens(rows, sum(lengths) + padding, seed)
    positions = torch.cat([torch.arange(length) for length in (*lengths, padding)]).expand(ids.shape).contiguous()
    real = (torch.arange(ids.shape[1]) < sum(lengths)).expand(ids.shape).contiguous()
    labels = ids.where(real & (positions > 0), -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "real": real}


def calibration(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [packed(seed=seed) for seed in range(count)]


def numpy_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the centring matrix written out."""
    n = len(x)
    H = np.eye(n) - np.ones((n, n)) / n
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    return float(np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L)))


@pytest.mark.parametrize(("count", "width", "other"), [(40, 7, 7), (9, 30, 30), (20, 5, 60)])
def test_cka_is_the_quotient_of_hsics(count, width, other):
    generator = np.random.default_rng(3)
    x = generator.normal(5.0, 1.0, (count, width))
    y = np.hstack([x[:, :3], generator.normal(size=(count, other - 3))])
    ours = linear_cka(torch.from_numpy(x), torch.from_numpy(y))
    assert 0 < ours < 1
    assert ours == pytest.approx(numpy_cka(x, y), rel=1e-10)


def test_cka_sees_no_turn_no_scale_and_no_shift_and_nothing_in_a_constant():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, torch.ones(20, 6)) == 0.0


def _blocks(sizes, seed=0):
    """Representations that are nearly the same within a block and strangers between blocks."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        base = torch.randn(50, 8, generator=generator)
        found += [base + 0.05 * torch.randn(50, 8, generator=generator) for _ in range(size)]
    return found


@pytest.mark.parametrize("sizes", [(3, 4, 3), (1, 6, 2), (5, 1, 1, 1), (7,), (1, 1, 1, 1)])
def test_blocks_of_like_layers_are_found(sizes):
    outputs = _blocks(sizes)
    clusters = adjacent_clusters(len(outputs), len(sizes), lambda i, j: linear_cka(outputs[i], outputs[j]))
    starts = [0, *itertools.accumulate(sizes)]
    assert clusters == [range(a, b) for a, b in itertools.pairwise(starts)]


def test_a_cluster_speaks_by_its_last_layer():
    """Outputs that drift: each is like its neighbour, and chaining them all up would hide how far they went."""
    places = [0.0, 1.0, 2.0, 3.0, 4.5]
    clusters = adjacent_clusters(5, 2, lambda i, j: -abs(places[i] - places[j]))
    # 0|1 merge first and speak by 1, then 1|2 and 2|3 are as near as before; the wide step is left.
    assert clusters == [range(4), range(4, 5)]
    assert adjacent_clusters(3, 2, lambda i, j: 1.0) == [range(2), range(2, 3)]


def test_cka_keeps_one_layer_of_each_block_of_a_model(family_model):
    """Two layers of the middle do something; the others pass on what they get, so blocks begin at those two."""
    model = tiny_model(family_model.config.model_type, depth=10)
    family = family_of(model)
    with torch.no_grad():
        for i in (1, 2, 4, 5, 7, 8):
            for name in (family.attention_out, family.mlp_out):
                for parameter in layers_of(model)[i].get_submodule(name).parameters():
                    parameter.zero_()
    plan, config = SplitPlan(bottom=1, keep=3, top=1), EmulatorConfig(layers="cka")
    assert choose_layers(model, plan, config, calibration()) == [0, 3, 6]


def test_outputs_of_packed_documents_are_those_of_each_alone(family_model):
    batch = packed(rows=1, lengths=(5, 9), padding=3)
    together = middle_outputs(family_model, PLAN, [batch])
    parts = [{"input_ids": part} for part in batch["input_ids"].split([5, 9, 3], dim=1)[:2]]
    alone = middle_outputs(family_model, PLAN, parts)
    assert len(together) == 4 and all(output.shape == (14, 32) for output in together)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _plain_gradients(model, plan, kept, batches):
    """Gradients of the adapter's weights, [batches, weights], by back-propagation through a copy of the model."""
    rows = []
    for batch in batches:
        plan = plan.model_copy(update={"keep": len(kept)})
        copy = emulate(model, plan, list(kept))
        LanguageModel(copy)(**batch)["loss"].backward()
        layers = [layers_of(copy)[i] for i in plan.adapter_positions(plan.depth)]
        rows.append(np.concatenate([p.grad.flatten().numpy() for layer in layers for p in layer.parameters()]))
    return np.stack(rows).astype(np.float64)


def test_the_distance_is_that_of_back_propagation_in_the_inverse_fisher_norm(family_model):
    plan, kept, batches = SplitPlan(bottom=1, keep=2, top=2), (0, 2), calibration(2)
    full, dropped = (_plain_gradients(family_model, plan, k, batches) for k in ((0, 1, 2), kept))
    fisher = (full**2).mean(0)
    weight = 1 / (fisher + 0.01 * fisher.mean())
    expected = (weight * (dropped - full) ** 2).sum() / (weight * full**2).sum()
    ours = AdapterGradients(family_model, plan, batches)
    assert ours.distance(kept) == pytest.approx(expected, rel=1e-3)
    assert ours.distance((0, 1, 2)) == pytest.approx(0, abs=1e-9)


def test_the_gradient_is_kept_nearly_as_well_as_any_subset_can(family_model):
    model = tiny_model(family_model.config.model_type, DEPTH)
    chosen = tuple(choose_layers(model, PLAN, EmulatorConfig(layers="gradient"), calibration()))
    distances = AdapterGradients(model, PLAN, calibration())
    every = {kept: distances.distance(kept) for kept in itertools.combinations(range(MIDDLE), PLAN.keep)}
    assert sorted(every, key=lambda kept: every[kept]).index(chosen) < 3
    assert every[chosen] <= every[tuple(uniform_layers(MIDDLE, PLAN.keep))]


def test_of_large_adapters_a_sample_tells_the_distance(monkeypatch):
    model, kept = tiny_model("llama", DEPTH), (0, 3, 6)
    exact = AdapterGradients(model, PLAN, calibration()).distance(kept)
    monkeypatch.setattr(gradient, "_COORDINATES", 4000)
    sampled, again = (AdapterGradients(model, PLAN, calibration()) for _ in range(2))
    assert 3900 < sampled.difference(kept).numel() / 2 < 4100
    assert sampled.distance(kept) == pytest.approx(exact, rel=0.05)
    assert sampled.distance(kept) == again.distance(kept)


@pytest.mark.parametrize("layers", CHOICES)
def test_equal_inputs_give_equal_layers_and_the_model_stays_as_it_was(layers):
    model = tiny_model("opt", DEPTH).train()
    layers_of(model)[2].eval()
    layers_of(model)[0].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    found = [choose_layers(model, PLAN, EmulatorConfig(layers=layers), calibration()) for _ in range(2)]
    assert found[0] == found[1] == sorted(set(found[0])) and len(found[0]) == PLAN.keep
    assert set(found[0]) <= set(range(MIDDLE))
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layers", ["cka", "gradient"])
def test_only_the_first_rows_count(layers, monkeypatch):
    seen = []
    monkeypatch.setitem(CHOICES, layers, lambda model, plan, batches: seen.extend(batches) or [0])
    batches = iter(calibration(3))
    choose_layers(tiny_model("opt"), PLAN, EmulatorConfig(layers=layers, calibration=3), batches)
    expected = torch.cat([batch["input_ids"] for batch in calibration(2)])[:3]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in seen]), expected)
    assert len(list(batches)) == 1, "what does not count is not asked for"


@pytest.mark.parametrize("layers", CHOICES)
def test_a_whole_middle_is_kept_without_a_look(layers):
    plan = SplitPlan(bottom=1, keep=4, top=1)
    assert choose_layers(tiny_model("opt"), plan, EmulatorConfig(layers=layers), []) == [0, 1, 2, 3]


@pytest.mark.parametrize("layers", ["cka", "gradient"])
def test_a_single_layer_can_be_kept(layers):
    plan = SplitPlan(bottom=1, keep=1, top=1)
    (kept,) = choose_layers(tiny_model("opt"), plan, EmulatorConfig(layers=layers), calibration())
    assert 0 <= kept < 4
    if layers == "cka":
        assert kept == 1


@pytest.mark.parametrize("layers", ["cka", "gradient"])
def test_what_cannot_be_compared_is_refused(layers):
    config = EmulatorConfig(layers=layers)
    with pytest.raises(DataError, match=f"emulator.layers is '{layers}', which looks at public text"):
        choose_layers(tiny_model("opt"), PLAN, config, [])
    with pytest.raises(SplitError, match="only 1 layers lie"):
        choose_layers(tiny_model("opt", depth=3), PLAN, config, calibration())
    broken = tiny_model("opt")
    with torch.no_grad():
        layers_of(broken)[2].fc2.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite.*emulator\.layers=uniform"):
        choose_layers(broken, PLAN, config, calibration())


@pytest.mark.parametrize("layers", ["cka", "gradient"])
@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_layers_of_image_models_are_chosen_by_images_without_classes(model_type, layers):
    model = tiny_image_model(model_type, DEPTH)
    batches = [{"pixel_values": images(3, seed), "labels": torch.full((3,), -1)} for seed in range(3)]
    chosen = choose_layers(model, PLAN, EmulatorConfig(layers=layers), batches)
    assert len(chosen) == PLAN.keep and set(chosen) <= set(range(MIDDLE))
    if layers == "gradient":
        distances = AdapterGradients(model, PLAN, batches)
        every = sorted(map(distances.distance, itertools.combinations(range(MIDDLE), PLAN.keep)))
        assert distances.distance(chosen) <= every[2]
        assert distances.distance(chosen) <= distances.distance(uniform_layers(MIDDLE, PLAN.keep))
