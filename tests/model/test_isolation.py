"""Packed documents give the logits they have alone, for every family."""

from __future__ import annotations

import torch

from ot_ray.model import (
    DistillLoss,
    DistillModel,
    LanguageModel,
    SplitPlan,
    isolated_documents,
    prepare_tuning,
)
from tests.fixtures.models import tokens


def _packed(lengths):
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, positions


def test_packed_documents_do_not_see_each_other(family_model):
    ids, positions = _packed([5, 9, 7])
    with torch.no_grad(), isolated_documents(family_model):
        packed = family_model(input_ids=ids, position_ids=positions, use_cache=False).logits
    with torch.no_grad():
        alone = torch.cat([family_model(part, use_cache=False).logits for part in ids.split([5, 9, 7], dim=1)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    with torch.no_grad():
        joined = family_model(ids, use_cache=False).logits
    assert not torch.allclose(joined, alone, atol=1e-2), "without isolation the documents do see each other"


def test_distillation_keeps_documents_apart_too(family_model):
    plan = SplitPlan(bottom=1, keep=2, top=1)
    distill = DistillModel(family_model, plan, [0, 3], DistillLoss())
    ids, positions = _packed([5, 7])
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 1) % 90 + 2
    with torch.no_grad(), isolated_documents(distill.model):
        a = distill.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        b = distill.model(input_ids=other, position_ids=positions, use_cache=False).logits
    assert torch.equal(a[:, 5:], b[:, 5:])
    assert not torch.equal(a[:, :5], b[:, :5])


def test_a_lora_model_keeps_documents_apart(family_model):
    tuned = LanguageModel(prepare_tuning(family_model, SplitPlan(bottom=1, keep=4, top=1), "lora"))
    ids, positions = _packed([5, 7])
    labels = ids.clone()
    labels[:, :6] = -100
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 1) % 90 + 2
    with torch.no_grad():
        losses = [tuned(input_ids=x, labels=labels, position_ids=positions)["loss"] for x in (ids, other)]
    assert torch.equal(*losses)
