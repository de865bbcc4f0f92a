"""Perplexity on packed sequences against plain Transformers, one document at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ot_ray.data import TokenSpan, pack
from ot_ray.errors import DataError
from ot_ray.evaluation import mean_loss, perplexity
from ot_ray.model import LoraSettings, SplitPlan, adapter_state, emulate, plug_in, prepare_tuning
from tests.fixtures.models import VOCAB, tiny_model, tokens

LENGTHS = [5, 9, 3, 7, 12, 4, 8]


def documents():
    rows = tokens(len(LENGTHS), max(LENGTHS), seed=3).tolist()
    return [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]


def packed(learn_from=0):
    """Whole documents, several to a sequence of 16 tokens, with padding."""
    spans = [TokenSpan(ids, [i >= learn_from for i in range(len(ids))], splittable=False) for ids in documents()]
    return pack(spans, 16, pad_id=0)


def one_by_one(model, learn_from=0):
    total, count = 0.0, 0
    for ids in documents():
        row = torch.tensor([ids])
        with torch.no_grad():
            shares = torch.log_softmax(model(row, use_cache=False).logits[0].double(), dim=-1)
        for i in range(max(1, learn_from), len(ids)):
            total -= shares[i - 1, ids[i]].item()
            count += 1
    return total / count


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "bloom", "gemma2", "qwen3"])
def test_packed_documents_count_as_they_do_alone(model_type):
    model = tiny_model(model_type)
    sequences = packed()
    assert len(sequences) < len(LENGTHS)
    assert mean_loss(model, sequences) == pytest.approx(one_by_one(model), rel=1e-5)
    assert perplexity(model, sequences) == pytest.approx(math.exp(one_by_one(model)), rel=1e-4)


def test_tokens_that_are_not_learnt_do_not_count():
    model = tiny_model("llama")
    assert mean_loss(model, packed(learn_from=3)) == pytest.approx(one_by_one(model, 3), rel=1e-5)
    assert mean_loss(model, packed(learn_from=3)) != pytest.approx(one_by_one(model), rel=1e-3)


def test_the_batch_size_does_not_matter():
    model, sequences = tiny_model("opt"), packed()
    losses = [mean_loss(model, sequences, batch_size=size) for size in (1, 2, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_even_by_an_error(training):
    model = tiny_model("opt").train(training)
    mean_loss(model, packed())
    assert model.training is training
    broken = pack([TokenSpan([1, 10**6], [True] * 2)], 2, 0)
    with pytest.raises(IndexError):
        mean_loss(model, broken)
    assert model.training is training


def test_dropout_is_off():
    model = tiny_model("opt")
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    assert len({mean_loss(model.train(), packed()) for _ in range(3)}) == 1


def test_nothing_to_count_is_refused():
    with pytest.raises(DataError, match="no token of the evaluation data counts; check its labels"):
        mean_loss(tiny_model("llama"), [])


def from_whole_logits(model, sequences, dtype=None):
    """The same loss from the model's own logits of each whole sequence, one at a time, under autocast to `dtype`."""
    total, count = 0.0, 0
    for sequence in sequences:
        # A model that ignores `position_ids` would see the documents before: one document a sequence.
        assert int((sequence.position_ids[sequence.real] == 0).sum()) == 1
        ids, labels = sequence.input_ids[sequence.real][None], sequence.labels[sequence.real][None]
        with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def one_a_sequence():
    return [pack([TokenSpan(ids, [True] * len(ids), splittable=False)], 16, pad_id=0)[0] for ids in documents()]


# Gemma 2 bounds its logits, OPT's biases and GPT-2's tied head are cases of their own.
KINDS = ["gemma2", "opt", "gpt2", "llama"]


@pytest.mark.parametrize("model_type", KINDS)
def test_a_plugged_in_model_s_loss_is_that_of_its_own_logits(model_type):
    plan = SplitPlan(bottom=1, keep=2, top=1)
    full = tiny_model(model_type)
    tuned = emulate(tiny_model(model_type, seed=5), plan, [0, 3])
    model = plug_in(full, plan, adapter_state(tuned, plan))
    assert mean_loss(model, one_a_sequence()) == pytest.approx(from_whole_logits(model, one_a_sequence()), rel=1e-6)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_peft_model_counts_as_its_base_model_does(model_type):
    tuned = prepare_tuning(tiny_model(model_type), SplitPlan(bottom=1, keep=4, top=1), "lora", LoraSettings(rank=2))
    before = mean_loss(tuned, one_a_sequence())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    expected = from_whole_logits(tuned.get_base_model(), one_a_sequence())
    assert mean_loss(tuned, one_a_sequence()) == pytest.approx(expected, rel=1e-6)
    assert mean_loss(tuned.get_base_model(), one_a_sequence()) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_model_that_is_being_tuned_in_two_types_counts_in_the_lower_one(model_type):
    model = prepare_tuning(tiny_model(model_type).to(torch.bfloat16), SplitPlan(bottom=1, keep=4, top=1), "full")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()
    expected = from_whole_logits(model, one_a_sequence(), torch.bfloat16)
    # The model's products are of the same bfloat16 numbers; only the order of their sums differs.
    assert mean_loss(model, one_a_sequence()) == pytest.approx(expected, rel=2e-3)


class _Largest(TorchDispatchMode):
    """The most elements that any one result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_are_never_whole():
    rows = tokens(32, 64, seed=9).tolist()
    sequences = pack([TokenSpan(row, [True] * 64) for row in rows], 64, pad_id=0)
    model = tiny_model("llama", depth=1)
    with _Largest() as seen:
        mean_loss(model, sequences, batch_size=32)
    whole = 32 * 63 * VOCAB
    assert seen.elements < whole


def test_padding_is_not_computed():
    rows = pack([TokenSpan(ids, [True] * len(ids), splittable=False) for ids in documents()[:1]], 100, pad_id=0)
    model = tiny_model("opt", depth=1)
    lengths = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    mean_loss(model, rows)
    handle.remove()
    assert lengths == [LENGTHS[0]]
