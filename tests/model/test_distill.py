"""The distillation pass against separate teacher and student runs of plain Transformers models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from ot_ray.model import DistillLoss, DistillModel, DistillOptions, SplitPlan, emulate, isolated_documents
from ot_ray.model.families import first_of, layers_of
from ot_ray.model.skeleton import empty_model, fill
from tests.fixtures.models import tiny_model, tokens

PLAN = SplitPlan(bottom=2, keep=2, top=1)
KEPT = [0, 2]


def _output_of(model, position, ids, **inputs):
    """Hidden states after layer `position`, taken by a hook."""
    seen = []
    handle = layers_of(model)[position].register_forward_hook(lambda m, a, out: seen.append(first_of(out)))
    output = model(ids, use_cache=False, **inputs)
    handle.remove()
    return seen[0], output.logits


def _plain_losses(full, emulated, ids, labels):
    """Mean over rows of cross-entropy and distance, from two models apart, one row at a time."""
    lm, kd = [], []
    for i in range(len(ids)):
        with torch.no_grad():
            teacher, _ = _output_of(full, 4, ids[i : i + 1])
        student, logits = _output_of(emulated, 3, ids[i : i + 1])
        lm.append(F.cross_entropy(logits[0, :-1].float(), labels[i, 1:]))
        teacher, student = teacher.float(), student.float()
        kd.append(((teacher - student) / teacher.pow(2).mean().sqrt()).pow(2).mean())
    return torch.stack(lm).mean(), torch.stack(kd).mean()


def _batch():
    """Two rows that learn on unequal numbers of tokens."""
    ids = tokens(2, 14)
    labels = ids.clone()
    labels[0, :9] = -100
    return ids, labels


def test_one_pass_equals_teacher_and_student_apart(family_model):
    ids, labels = _batch()
    lm, kd = _plain_losses(family_model, emulate(family_model, PLAN, KEPT), ids, labels)
    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss(lm_weight=0.5, kd_weight=2.0))
    output = distill(input_ids=ids, labels=labels)
    torch.testing.assert_close(output["kd_loss"], kd.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output["lm_loss"], lm.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output["loss"], 0.5 * lm + 2.0 * kd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_emulator_learns_and_its_gradients_are_autograds(family_model, checkpointing):
    ids, labels = _batch()
    emulated = emulate(family_model, PLAN, KEPT)
    lm, kd = _plain_losses(family_model, emulated, ids, labels)
    (lm + 30 * kd).backward()
    expected = [parameter.grad for layer in layers_of(emulated)[2:4] for parameter in layer.parameters()]

    options = DistillOptions(checkpointing=checkpointing, head_tokens=3)
    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss(), options)
    distill(input_ids=ids, labels=labels)["loss"].backward()
    learning = [parameter for parameter in distill.parameters() if parameter.requires_grad]
    assert len(learning) == len(expected)
    assert all(parameter.grad is None for parameter in distill.parameters() if not parameter.requires_grad)
    for parameter, gradient in zip(learning, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-4, atol=2e-5)


def _gradients(distill, ids, labels):
    distill.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distill(input_ids=ids, labels=labels)["loss"]
    loss.backward()
    return loss, [parameter.grad for parameter in distill.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("model_type", ["opt", "llama", "gemma2"])
def test_in_bfloat16_it_is_as_near_to_float32_as_two_models_apart_are(model_type):
    model, (ids, labels) = tiny_model(model_type), _batch()
    exact_student, plain_student = (emulate(model, PLAN, KEPT) for _ in range(2))
    lm, kd = _plain_losses(model, exact_student, ids, labels)
    (lm + 30 * kd).backward()
    with torch.autocast("cpu", torch.bfloat16):
        plain_lm, plain_kd = _plain_losses(model, plain_student, ids, labels)
    (plain_lm + 30 * plain_kd).backward()
    exact, plain = ([p.grad for m in layers_of(s)[2:4] for p in m.parameters()] for s in (exact_student, plain_student))
    loss, ours = _gradients(DistillModel(model, PLAN, KEPT, DistillLoss()), ids, labels)
    assert abs(loss / (lm + 30 * kd) - 1) < 0.03

    def distance(gradients):
        squares = sum((g - e).pow(2).sum() for g, e in zip(gradients, exact, strict=True))
        return (squares / sum(e.pow(2).sum() for e in exact)).sqrt().item()

    assert 0 < distance(ours) < 1.5 * distance(plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_bit(autocast):
    ids, labels = _batch()
    found = []
    for checkpointing in (False, True):
        model = tiny_model("opt")
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.3
        options = DistillOptions(checkpointing=checkpointing)
        distill = DistillModel(model, PLAN, KEPT, DistillLoss(), options).train()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = distill(input_ids=ids, labels=labels)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in distill.parameters() if p.requires_grad)])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


def _kept_bytes(distill, ids):
    """Bytes that the backward pass keeps from the forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in distill.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = distill(input_ids=ids, labels=ids)["loss"]
    del loss
    return sum(kept.values())


def test_checkpointing_keeps_less_for_the_backward_pass():
    plain, again = (
        DistillModel(tiny_model("opt"), PLAN, KEPT, DistillLoss(), DistillOptions(checkpointing=on))
        for on in (False, True)
    )
    assert _kept_bytes(again, tokens(4, 64)) < 0.5 * _kept_bytes(plain, tokens(4, 64))


@pytest.mark.parametrize("setting", ["full", "emulated"])
def test_one_lane_alone_is_the_model_of_its_name(family_model, setting):
    ids, labels = tokens(1, 15), tokens(1, 15)
    labels[0, :4] = -100
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    alone = family_model if setting == "full" else emulate(family_model, PLAN, KEPT)
    with torch.no_grad(), isolated_documents(alone):
        logits = alone(input_ids=ids, position_ids=positions, use_cache=False).logits
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss())
    output = distill(input_ids=ids, labels=labels, position_ids=positions, setting=setting)
    torch.testing.assert_close(output["nll"], expected, rtol=1e-5, atol=0)
    assert output["tokens"].item() == 11
    assert not output["nll"].requires_grad


def test_each_tensor_says_which_of_the_full_model_it_starts_from(family_model):
    stored = family_model.state_dict()
    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss())
    origins = distill.origins()
    assert set(dict(distill.named_parameters())) <= origins.keys()
    assert set(origins.values()) | {"lm_head.weight"} == set(stored)
    ours = {**dict(distill.named_parameters()), **dict(distill.named_buffers())}
    assert all(torch.equal(ours[name], stored[origin]) for name, origin in origins.items())


def test_an_empty_model_filled_afterwards_gives_the_same_bits(family_model):
    stored = family_model.state_dict()
    empty = empty_model(copy.deepcopy(family_model.config), torch.float32).eval()
    distill = DistillModel(empty, PLAN, KEPT, DistillLoss())
    assert all(parameter.is_meta for parameter in distill.parameters())
    origins = distill.origins()
    fill(distill, lambda name: stored[origins[name]].clone())
    ids, labels = _batch()
    loss = distill(input_ids=ids, labels=labels)["loss"]
    expected = DistillModel(family_model, PLAN, KEPT, DistillLoss())(input_ids=ids, labels=labels)["loss"]
    assert torch.equal(loss, expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_give_the_same_losses_and_gradients():
    ids, labels = _batch()
    found = []
    counters.clear()
    # Compiling in this process leaves no pool of compilers behind.
    with inductor_config.patch(compile_threads=1):
        for compiled in (False, True):
            model, plan = tiny_model("opt", depth=4), SplitPlan(bottom=1, keep=1, top=1)
            distill = DistillModel(model, plan, [0], DistillLoss(), DistillOptions(compile=compiled))
            loss = distill(input_ids=ids, labels=labels)["loss"]
            loss.backward()
            gradients = {name: p.grad for name, p in distill.named_parameters() if p.requires_grad}
            found.append({"loss": loss.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["calls_captured"] > 0, "nothing was compiled"
    torch._dynamo.reset()


def test_teacher_stays_as_it_was_when_the_student_moves(family_model):
    before = {name: tensor.clone() for name, tensor in family_model.state_dict().items()}
    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss())
    optimizer = torch.optim.SGD([p for p in distill.parameters() if p.requires_grad], lr=0.1)
    distill(input_ids=tokens(), labels=tokens())["loss"].backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in family_model.state_dict().items())
    moved = distill.emulator_state()
    start = {f"{i}.{n}": t for i, k in enumerate([2, 4]) for n, t in layers_of(family_model)[k].named_parameters()}
    assert moved.keys() == start.keys()
    assert any(not torch.equal(moved[name], start[name]) for name in moved)


def test_teacher_kept_whole_has_no_distance():
    model = tiny_model("llama")
    distill = DistillModel(model, SplitPlan(bottom=2, keep=3, top=1), [0, 1, 2], DistillLoss())
    assert distill(input_ids=tokens(), labels=tokens())["kd_loss"].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_losses_are_float32(dtype):
    distill = DistillModel(tiny_model("opt").to(dtype), PLAN, KEPT, DistillLoss())
    output = distill(input_ids=tokens(), labels=tokens())
    assert output["loss"].dtype == output["kd_loss"].dtype == output["lm_loss"].dtype == torch.float32


def test_dropout_reaches_the_student_alone():
    model = tiny_model("opt")
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    teacher, _ = _output_of(model, 4, tokens())
    distill = DistillModel(model, PLAN, KEPT, DistillLoss()).train()
    seen = []
    for layer, keep in zip(layers_of(distill.model), ["", "", "", "", "teacher", "", "student", ""], strict=True):
        if keep:
            layer.register_forward_hook(lambda m, a, out, keep=keep: seen.append((keep, first_of(out).detach())))
    for _ in range(2):
        distill(input_ids=tokens(), labels=tokens())
    outputs = {name: [out for keep, out in seen if keep == name] for name in ("teacher", "student")}
    assert all(torch.equal(out, teacher) for out in outputs["teacher"])
    assert not torch.equal(*outputs["student"])
