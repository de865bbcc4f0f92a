"""The distillation pass against separate teacher and student runs of plain Transformers models."""

from __future__ import annotations

import pytest
import torch

from ot_ray.model import DistillLoss, DistillModel, SplitPlan, emulate, next_token_loss, normalized_mse
from ot_ray.model.families import first_of, layers_of
from tests.fixtures.models import tiny_model, tokens

PLAN = SplitPlan(bottom=2, keep=2, top=1)
KEPT = [0, 2]


def _output_of(model, position, ids):
    """Hidden states after layer `position`, taken by a hook."""
    seen = []
    handle = layers_of(model)[position].register_forward_hook(lambda m, a, out: seen.append(first_of(out)))
    output = model(ids, use_cache=False)
    handle.remove()
    return seen[0], output.logits


def test_one_pass_equals_teacher_and_student_apart(family_model):
    ids = tokens(2, 14)
    teacher, _ = _output_of(family_model, 4, ids)
    student, student_logits = _output_of(emulate(family_model, PLAN, KEPT), 3, ids)
    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss(lm_weight=0.5, kd_weight=2.0))
    output = distill(input_ids=ids, labels=ids)
    rms = teacher.pow(2).mean().sqrt()
    expected_kd = ((teacher - student) / rms).pow(2).mean()
    torch.testing.assert_close(output["kd_loss"], expected_kd.detach(), rtol=1e-5, atol=0)
    expected_lm = torch.nn.functional.cross_entropy(student_logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output["lm_loss"], expected_lm.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output["loss"], 0.5 * expected_lm + 2.0 * expected_kd, rtol=1e-5, atol=0)


def test_only_the_emulator_learns_and_its_gradients_are_autograds(family_model):
    ids = tokens(2, 14)
    emulated = emulate(family_model, PLAN, KEPT)
    teacher, _ = _output_of(family_model, 4, ids)
    student, logits = _output_of(emulated, 3, ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = loss + 30 * ((teacher.detach() - student) / teacher.detach().pow(2).mean().sqrt()).pow(2).mean()
    loss.backward()
    expected = [parameter.grad for layer in layers_of(emulated)[2:4] for parameter in layer.parameters()]

    distill = DistillModel(family_model, PLAN, KEPT, DistillLoss())
    distill(input_ids=ids, labels=ids)["loss"].backward()
    learning = [parameter for parameter in distill.parameters() if parameter.requires_grad]
    assert len(learning) == len(expected)
    assert all(parameter.grad is None for parameter in distill.parameters() if not parameter.requires_grad)
    for parameter, gradient in zip(learning, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-4, atol=2e-5)


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


def test_padding_does_not_count():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 8, generator=generator)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[:, 4:] = False
    cut = normalized_mse(student[:, :4], teacher[:, :4])
    masked = normalized_mse(student, teacher, real)
    torch.testing.assert_close(masked, cut)
    expected = ((teacher[:, :4] - student[:, :4]) / teacher[:, :4].pow(2).mean().sqrt()).pow(2).mean()
    torch.testing.assert_close(masked, expected)
    assert normalized_mse(student, teacher, torch.zeros_like(real)).item() == 0.0


def test_next_token_loss_is_transformers_own():
    model, ids = tiny_model("gpt2"), tokens(3, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    torch.testing.assert_close(next_token_loss(output.logits, labels), output.loss)
    nothing = next_token_loss(output.logits.requires_grad_(), torch.full_like(ids, -100))
    assert nothing.item() == 0.0
    nothing.backward()


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
