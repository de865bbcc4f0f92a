"""Columns that are padding in every row are not computed, and nothing that is learnt changes by that."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from ot_ray.data import TokenSpan, collate, pack
from ot_ray.model import LanguageModel
from ot_ray.training.engine import TorchEngine
from tests.fixtures.models import tiny_model, tokens
from tests.training.samples import training

SIZES = [[5, 4], [7], [3, 3, 4], [13]]
LENGTH = 24


def batch():
    """Four rows of one to three documents; the longest row fills 13 of 24 columns."""
    ids = iter(tokens(len(SIZES) * 3, LENGTH, seed=2).tolist())
    rows = []
    for sizes in SIZES:
        spans = [TokenSpan(next(ids)[:size], [True] * size, splittable=False) for size in sizes]
        (row,) = pack(spans, LENGTH, pad_id=0)
        rows.append(row)
    return collate(rows)


def engine(model, **settings):
    config = training(batch_size=len(SIZES), grad_clip=0, warmup_steps=0, **settings)
    return TorchEngine(LanguageModel(model), config, "cpu")


@pytest.mark.parametrize("model_type", ["bloom", "gemma2", "gpt2", "llama", "mistral", "opt", "qwen3"])
@pytest.mark.parametrize("micro", [None, 1])
def test_loss_gradients_and_step_are_those_of_the_whole_columns(model_type, micro):
    model = tiny_model(model_type, depth=3).requires_grad_(True)
    whole = copy.deepcopy(model)
    # Compiled code has one shape, so that its engine cuts nothing; nothing here is compiled.
    expected = engine(whole, compile=True).step(batch(), 1e-3)
    found = engine(model, micro_batch_size=micro).step(batch(), 1e-3)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, [13]),
        ({"micro_batch_size": 1}, [9, 7, 10, 13]),
        ({"micro_batch_size": 2}, [9, 13]),
        ({"compile": True}, [24]),
    ],
)
def test_each_pass_is_as_long_as_its_longest_row(settings, lengths):
    model = tiny_model("opt", depth=2).requires_grad_(True)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine(model, **settings).step(batch(), 1e-3)
    assert seen == lengths


def test_documents_stay_apart_where_the_padding_is_cut():
    model = tiny_model("opt", depth=2).requires_grad_(True)
    rows = batch()
    with torch.no_grad():
        losses = []
        for ids, positions, real in zip(rows["input_ids"], rows["position_ids"], rows["real"], strict=True):
            starts = [*((positions == 0) & real).nonzero().flatten().tolist(), int(real.sum())]
            parts = [
                torch.nn.functional.cross_entropy(
                    model(ids[None, a:b], use_cache=False).logits[0, :-1], ids[a + 1 : b], reduction="none"
                )
                for a, b in itertools.pairwise(starts)
            ]
            losses.append(torch.cat(parts).mean())
    assert engine(model).step(rows, 1e-3)["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
