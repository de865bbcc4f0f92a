"""Perplexity on packed sequences against plain Transformers, one document at a time."""

from __future__ import annotations

import math

import pytest
import torch

from ot_ray.data import TokenSpan, pack
from ot_ray.errors import DataError
from ot_ray.evaluation import mean_loss, perplexity
from tests.fixtures.models import tiny_model, tokens

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
