"""Emulators with smaller maps: factors against numpy, channels against masked ones, and their bundles opened again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from ot_ray.errors import DataError, SplitError, TrainingError, UnsupportedModelError
from ot_ray.model import (
    DistillLoss,
    DistillModel,
    EmulatorConfig,
    LanguageModel,
    SplitPlan,
    compress,
    emulate,
    family_of,
    load_emulator,
)
from ot_ray.model.choice import smaller_layers
from ot_ray.model.choice.factors import weighted_factors
from ot_ray.model.families import IMAGE_FAMILIES, layers_of, linear_names
from ot_ray.model.packed import PackedLinear, with_smaller_layers
from ot_ray.model.packed.factored import LowRankLinear, attention_maps, factored_rank, kept_channels, sizes
from tests.fixtures.models import images, tiny_image_model, tiny_model, tokens

PLAN, KEPT = SplitPlan(bottom=1, keep=2, top=1), [0, 3]
BOTH = EmulatorConfig(attention_rank=0.25, mlp_channels=0.5)


def calibration():
    ids = [tokens(2, 14, seed) for seed in range(2)]
    real = (torch.arange(14) < 11).expand(2, 14).contiguous()
    return [{"input_ids": i, "labels": i.where(real, -100), "real": real} for i in ids]


def smaller(model, config, batches=None):
    """The emulated model with smaller maps, filled with what they start from."""
    state = smaller_layers(model, PLAN, KEPT, config, batches or calibration())
    emulated = with_smaller_layers(emulate(model, PLAN, KEPT), PLAN, config)
    load_emulator(emulated, PLAN, state)
    return emulated


def _root(moment: np.ndarray) -> np.ndarray:
    """The root of a second moment scaled to a mean of 1, with a hundredth added to the diagonal."""
    scaled = moment / np.trace(moment) * len(moment)
    values, vectors = np.linalg.eigh(scaled + 0.01 * np.eye(len(moment)))
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_factors_miss_exactly_the_singular_values_that_are_left_out(shape):
    generator = np.random.default_rng(2)
    weight = generator.normal(size=shape)
    x, g = generator.normal(size=(50, shape[1])) * np.arange(1, shape[1] + 1), generator.normal(size=(50, shape[0]))
    c, root = _root(x.T @ x), _root(g.T @ g)
    values = np.linalg.svd(root @ weight @ c, compute_uv=False)
    moments = torch.from_numpy(x.T @ x), torch.from_numpy(g.T @ g)
    for rank in (1, 3, 8):
        up, down = weighted_factors(torch.from_numpy(weight), *moments, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
        error = np.linalg.norm(root @ (weight - (up @ down).numpy()) @ c)
        assert error == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-8, abs=1e-9)


def test_a_map_is_factored_only_where_that_makes_it_smaller():
    assert factored_rank(32, 32, 0.25) == 8
    assert factored_rank(32, 32, 0.5) is None
    assert factored_rank(32, 32, None) is None
    assert factored_rank(32, 96, 0.6) == 19
    assert factored_rank(32, 32, 0.001) == 1


def test_a_share_below_one_takes_a_channel_away():
    assert [kept_channels(48, share) for share in (None, 1.0, 0.9999, 0.5, 0.001)] == [48, 48, 47, 24, 1]


def test_channels_stay_by_what_leaving_them_out_does_to_the_loss(family_model):
    """Against a mask on the full model: the gradient of the loss by a gate of each channel and token, squared."""
    config, family = EmulatorConfig(mlp_channels=0.5), family_of(family_model)
    emulated = smaller(family_model, config)
    out = layers_of(family_model)[1].get_submodule(family.mlp_out)
    scores = torch.zeros(sizes(out)[0])
    for batch in calibration():
        gates = torch.ones(2, 14, len(scores), requires_grad=True)
        handle = out.register_forward_pre_hook(lambda m, a, gates=gates: (a[0] * gates.view(*a[0].shape),))
        LanguageModel(family_model)(**batch)["loss"].backward()
        handle.remove()
        scores += gates.grad[batch["real"]].pow(2).sum(0)
    best = scores.topk(len(scores) // 2).indices
    mask = torch.zeros(len(scores)).index_fill(0, best, 1.0)
    masked = emulate(family_model, PLAN, KEPT)
    layers_of(masked)[1].get_submodule(family.mlp_out).register_forward_pre_hook(lambda m, a: (a[0] * mask,))
    ours, theirs = ([] for _ in range(2))
    for model, seen in ((emulated, ours), (masked, theirs)):
        mlp_out = layers_of(model)[1].get_submodule(family.mlp_out)
        mlp_out.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(tokens(1, 9))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


def test_an_emulator_with_whole_shares_is_the_emulated_model(family_model):
    config = EmulatorConfig(attention_rank=1.0, mlp_channels=1.0)
    with torch.no_grad():
        logits = smaller(family_model, config)(tokens()).logits
        expected = emulate(family_model, PLAN, KEPT)(tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weighted_factors_keep_the_loss_better_than_plain_ones():
    """Over seeds; the plain singular values know nothing of what passes through the maps."""
    ours, plain = [], []
    config = EmulatorConfig(attention_rank=0.25)
    for seed in range(6):
        model = tiny_model("opt", seed=seed)
        reference = emulate(model, PLAN, KEPT)
        weighted, truncated = smaller(model, config), smaller(model, config)
        for place in (1, 2):
            for name in attention_maps(layers_of(reference)[place], family_of(model)):
                u, s, v = torch.linalg.svd(layers_of(reference)[place].get_submodule(name).weight, full_matrices=False)
                factors = layers_of(truncated)[place].get_submodule(name)
                with torch.no_grad():
                    factors.up.weight.copy_(u[:, :8] * s[:8])
                    factors.weight.copy_(v[:8])
        with torch.no_grad():
            expected = reference(calibration()[0]["input_ids"]).logits
            for found, emulated in ((ours, weighted), (plain, truncated)):
                logits = emulated(calibration()[0]["input_ids"]).logits
                found.append(((logits - expected)[:, :11]).pow(2).mean().item())
    assert sum(ours) < sum(plain)


@pytest.mark.parametrize(
    "changes", [{}, {"bits": 4, "group_size": 8}, {"sparsity": 0.5}, {"sparsity": 0.5, "bits": 8, "group_size": 16}]
)
def test_a_checkpoint_opens_as_it_was_and_is_smaller(family_model, tmp_path, changes):
    config = BOTH.model_copy(update=changes)
    emulated = compress(smaller(family_model, config), PLAN, config).eval()
    emulated.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(opened(tokens()).logits, emulated(tokens()).logits)
    assert opened.state_dict().keys() == emulated.state_dict().keys()
    maps = [m for name in linear_names(layers_of(opened)[1]) for m in [layers_of(opened)[1].get_submodule(name)]]
    packed = [m for m in layers_of(opened)[1].modules() if isinstance(m, PackedLinear)]
    assert bool(maps) != bool(packed)
    if not changes:
        whole = sum(p.numel() for p in layers_of(family_model)[1].parameters())
        assert sum(p.numel() for p in layers_of(opened)[1].parameters()) < 0.72 * whole


@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_image_models_have_smaller_maps_too(model_type, tmp_path):
    model = tiny_image_model(model_type)
    batches = [{"pixel_values": images(3, seed), "labels": torch.full((3,), -1)} for seed in range(2)]
    emulated = compress(smaller(model, BOTH, batches), PLAN, BOTH)
    emulated.save_pretrained(tmp_path)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(opened(pixel_values=images()).logits, emulated(pixel_values=images()).logits)


@pytest.mark.parametrize("changes", [{}, {"bits": 4, "group_size": 8, "sparsity": 0.5}])
def test_smaller_maps_learn_and_what_they_learnt_is_what_is_packed(family_model, changes):
    config = BOTH.model_copy(update=changes)
    state = smaller_layers(family_model, PLAN, KEPT, config, calibration())
    start = with_smaller_layers(emulate(family_model, PLAN, KEPT), PLAN, config)
    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss(), emulator=config)
    distill.start_from(state)
    learning = [p for p in distill.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-3)
    ids = tokens()
    losses = []
    for _ in range(4):
        loss = distill(input_ids=ids, labels=ids)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in learning)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    load_emulator(start, PLAN, distill.emulator_state())
    start = compress(start, PLAN, config)
    ours = LanguageModel(start)(input_ids=ids, labels=ids)["loss"]
    output = distill(input_ids=ids, labels=ids, setting="emulated")
    torch.testing.assert_close(ours.detach(), output["nll"] / output["tokens"], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_or_cannot_be_weighed_is_refused():
    model = tiny_model("opt")
    state = smaller_layers(model, PLAN, KEPT, BOTH, calibration())
    with pytest.raises(DataError, match="there is none"):
        smaller_layers(model, PLAN, KEPT, BOTH, [])
    distill = DistillModel(model, PLAN, KEPT, DistillLoss(), emulator=EmulatorConfig(attention_rank=0.25))
    with pytest.raises(SplitError, match=r"does not fit it: 0\.fc1"):
        distill.start_from(state)
    broken = tiny_model("opt")
    with torch.no_grad():
        layers_of(broken)[1].fc1.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite on the calibration data"):
        smaller_layers(broken, PLAN, KEPT, BOTH, calibration())


def test_a_model_that_passes_by_its_linear_maps_is_refused():
    model = tiny_model("bloom")
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    with pytest.raises(UnsupportedModelError, match="slow_but_exact to false"):
        smaller_layers(model, PLAN, KEPT, EmulatorConfig(mlp_channels=0.5), calibration())


def test_no_tensor_of_a_factored_map_has_the_shape_of_the_map_that_goes_by_its_name(family_model):
    state = smaller_layers(family_model, PLAN, KEPT, EmulatorConfig(attention_rank=0.45), calibration())
    layer = layers_of(family_model)[1]
    factored = [name for name in attention_maps(layer, family_of(family_model)) if f"0.{name}.up.weight" in state]
    assert factored
    for name in factored:
        columns, rows = sizes(layer.get_submodule(name))
        assert state[f"0.{name}.weight"].shape not in ((rows, columns), (columns, rows))


def test_maps_that_nobody_filled_do_not_pass_for_weights():
    model = tiny_model("opt")
    distill = DistillModel(model, PLAN, KEPT, DistillLoss(), emulator=BOTH)
    assert distill(input_ids=tokens(), labels=tokens())["loss"].isnan()
    config = BOTH.model_copy(update={"bits": 4})
    unfilled = with_smaller_layers(emulate(model, PLAN, KEPT), PLAN, config)
    with pytest.raises(SplitError, match="holds NaN or infinity"):
        compress(unfilled, PLAN, config)


def test_the_model_that_is_looked_at_stays_as_it_was():
    model = tiny_model("gpt2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller_layers(model, PLAN, KEPT, BOTH, calibration())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and model.training
    assert not any(isinstance(m, LowRankLinear) for m in layers_of(model)[1].modules())
