"""The head's cross-entropy against the plain model's logits, for every family; the distance between lanes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ot_ray.model import LanguageHead, normalized_mse
from ot_ray.model.distill import body_output
from tests.fixtures.models import VOCAB, tiny_model, tokens


def _labels(ids):
    """Rows of unequal share: all learnt, some, nothing."""
    labels = ids.clone()
    labels[1, :7] = -100
    labels[1, 9] = -100
    labels[2] = -100
    return labels


def _by_row(logits, labels):
    """One row after the other, from the logits of a plain model."""
    rows = []
    for row, wanted in zip(logits.float(), labels, strict=True):
        learnt = wanted[1:] != -100
        rows.append(F.cross_entropy(row[:-1][learnt], wanted[1:][learnt]) if learnt.any() else row.sum() * 0)
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_loss_and_gradient_are_those_of_the_models_own_logits(family_model, chunk):
    model = family_model.requires_grad_(False)
    ids = tokens(3, 12)
    labels = _labels(ids)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    expected = _by_row(model(inputs_embeds=embedded, use_cache=False).logits, labels).mean()
    (expected_gradient,) = torch.autograd.grad(3 * expected, embedded)

    head = LanguageHead(model, tokens=chunk)
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    loss = head(hidden, labels)
    (gradient,) = torch.autograd.grad(3 * loss, embedded)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_a_head_that_learns_gets_autograds_gradient(family_model, chunk):
    ids = tokens(3, 12)
    expected = _by_row(family_model(ids, use_cache=False).logits, _labels(ids)).mean()
    expected.backward()
    expected_gradients = {n: p.grad.clone() for n, p in family_model.named_parameters() if p.grad is not None}
    family_model.zero_grad(set_to_none=True)
    loss = LanguageHead(family_model, chunk)(body_output(family_model, ids, None), _labels(ids))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours = {n: p.grad for n, p in family_model.named_parameters() if p.grad is not None}
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5)


def test_summed_counts_every_token_once(family_model):
    ids = tokens(3, 12)
    with torch.no_grad():
        logits = family_model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, _labels(ids)[:, 1:].flatten(), reduction="sum")
        summed = LanguageHead(family_model, 4)(body_output(family_model, ids, None), _labels(ids), summed=True)
    torch.testing.assert_close(summed, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_to_learn_is_nought_with_a_gradient_of_nought(frozen):
    model = tiny_model("gpt2").requires_grad_(not frozen)
    ids = tokens(2, 5)
    hidden = model.base_model(ids, use_cache=False).last_hidden_state.detach().requires_grad_()
    loss = LanguageHead(model)(hidden, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and not hidden.grad.any()


def test_the_mean_over_rows_does_not_depend_on_how_rows_are_divided():
    model, ids = tiny_model("llama"), tokens(3, 12)
    head, labels = LanguageHead(model, 4), _labels(ids)
    with torch.no_grad():
        whole = head(body_output(model, ids, None), labels)
        rows = [head(body_output(model, ids[i : i + 1], None), labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(rows).mean(), rtol=1e-6, atol=0)


class _Largest(TorchDispatchMode):
    """The most elements that any one result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("learns", [False, True])
def test_no_more_logits_exist_at_once_than_asked_for(learns):
    model, ids = tiny_model("llama").requires_grad_(learns), tokens(4, 60)
    hidden = body_output(model, ids, None).detach().requires_grad_()
    with _Largest() as seen:
        LanguageHead(model, 16)(hidden, ids).backward()
    # The hidden states themselves, 4 * 60 * 32, are larger than a chunk's logits and far smaller than all.
    assert seen.elements == max(hidden.numel(), 16 * VOCAB) < 4 * 59 * VOCAB


def test_in_bfloat16_autocast_the_head_is_as_near_as_the_plain_one():
    model, ids = tiny_model("llama").requires_grad_(False), tokens(2, 40)
    exact_hidden = body_output(model, ids, None).requires_grad_()
    exact = LanguageHead(model)(exact_hidden, ids)
    exact.backward()
    hidden, plain_hidden = (exact_hidden.detach().clone().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = LanguageHead(model, 7)(hidden, ids)
        plain = F.cross_entropy(model.lm_head(plain_hidden)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    plain.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    assert abs(loss - exact) <= abs(plain - exact) + 1e-3 * exact.abs()

    def distance(gradient):
        return ((gradient - exact_hidden.grad).norm() / exact_hidden.grad.norm()).item()

    assert distance(hidden.grad) <= 1.5 * distance(plain_hidden.grad) < 0.05


def test_a_bias_of_the_head_learns_too():
    ids = tokens(2, 9)
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB))
    hidden = body_output(model, ids, None).detach()
    logits = model.lm_head(hidden)[:, :-1].flatten(0, 1)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, ids[:, 1:].flatten()), model.lm_head.bias)
    (found,) = torch.autograd.grad(LanguageHead(model, 3)(hidden, ids), model.lm_head.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_padding_does_not_count():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 8, generator=generator)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[:, 4:] = False
    cut = normalized_mse(student[:, :4], teacher[:, :4])
    teacher[:, 5] = float("nan")
    torch.testing.assert_close(normalized_mse(student, teacher, real), cut)
    assert normalized_mse(student, teacher, torch.zeros_like(real)).item() == 0.0


def test_distance_is_the_mean_of_each_rows_own():
    student, teacher = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    teacher[1] *= 50
    real = torch.arange(6)[None] < torch.tensor([[6], [3], [1]])
    rows = []
    for s, t, r in zip(student, teacher, real, strict=True):
        rows.append(((t[r] - s[r]) / t[r].pow(2).mean().sqrt()).pow(2).mean())
    torch.testing.assert_close(normalized_mse(student, teacher, real), torch.stack(rows).mean())


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_accuracy_is_counted_as_the_loss_is_and_changes_nothing_of_it(family_model, chunk):
    ids = tokens(3, 12)
    logits = family_model(ids, use_cache=False).logits
    labels = _labels(ids)
    # Labels that the model finds likeliest, in some places, so that the accuracy is neither 0 nor 1.
    labels[:2, 8:] = torch.where(labels[:2, 8:] == -100, labels[:2, 8:], logits.argmax(-1)[:2, 7:-1])
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float()
    learnt = (labels[:, 1:] != -100).float()
    shares = learnt / learnt.sum(1, keepdim=True).clamp_min(1) / 3
    hidden = body_output(family_model, ids, None)
    head = LanguageHead(family_model, chunk)
    plain = head(hidden, labels)
    loss, accuracy = head(hidden, labels, accuracy=True)
    assert torch.equal(loss, plain)
    assert 0.1 < accuracy < 0.9
    torch.testing.assert_close(accuracy, (right * shares).sum(), rtol=1e-6, atol=0)
    assert not accuracy.requires_grad
    gradients = [torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, plain)]
    assert torch.equal(*gradients)
    assert head(hidden, labels, summed=True, accuracy=True)[1] == (right * learnt).sum()
