"""The decode loop against Transformers' own `generate`, and sampling against its definition."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from transformers import PreTrainedModel

from serve.engine.decoding import decode, score, score_prompt
from serve.engine.sampling import Sampler, Sampling
from tests.fixtures.models import tokens

GREEDY = Sampling(temperature=0)


def test_greedy_equals_generate(family_model: PreTrainedModel) -> None:
    prompt = tokens(batch=1, length=9)
    expected = family_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=-1
    )
    mine = [token for token, _ in islice(decode(family_model, prompt[0].tolist(), Sampler(GREEDY, 0)), 12)]
    assert mine == expected[0, 9:].tolist()


def test_scores_are_the_models_log_probabilities(base: PreTrainedModel) -> None:
    ids = tokens(batch=1, length=10)
    with torch.inference_mode():
        expected = torch.log_softmax(base(input_ids=ids).logits[0].float(), -1)
    scores = score_prompt(base, ids[0].tolist(), top=2)
    assert scores[0].logprob is None
    for place, item in enumerate(scores[1:]):
        assert item.logprob == pytest.approx(expected[place, ids[0, place + 1]].item(), abs=1e-5)
        best = expected[place].topk(2)
        assert list(item.top)[:2] == best.indices.tolist()
    step = score(3, torch.tensor([0.0, 2.0, 1.0, -1.0]), top=1)
    assert list(step.top) == [1, 3]
    assert score(3, torch.tensor([0.0, 2.0, 1.0, -1.0]), top=0).top == {}


def draws(sampling: Sampling, logits: torch.Tensor, count: int = 400) -> list[int]:
    return [Sampler(sampling, seed).pick(logits) for seed in range(count)]


def test_seed_decides_and_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    assert draws(Sampling(), logits) == draws(Sampling(), logits)
    share = draws(Sampling(), logits, 2000).count(0) / 2000
    assert share == pytest.approx(0.6, abs=0.04)
    colder = draws(Sampling(temperature=0.5), logits, 2000).count(0) / 2000
    assert colder == pytest.approx(0.36 / 0.46, abs=0.04)


def test_top_p_keeps_the_smallest_nucleus() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert set(draws(Sampling(top_p=0.0), logits)) == {1}
    assert set(draws(Sampling(top_p=0.5), logits)) == {1}
    assert set(draws(Sampling(top_p=0.7), logits)) == {1, 2}
    assert set(draws(Sampling(top_p=1.0), logits)) == {0, 1, 2}


def test_penalties_and_biases_shift_logits_and_leave_the_given_ones() -> None:
    logits = torch.tensor([1.0, 0.5, 0.0])
    assert Sampler(Sampling(temperature=0, logit_bias={2: 5.0}), 0).pick(logits) == 2
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.8), 0)
    assert [sampler.pick(logits) for _ in range(4)] == [0, 1, 0, 0]
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.4), 0)
    assert [sampler.pick(logits) for _ in range(5)] == [0, 0, 1, 0, 1]
    assert logits.tolist() == [1.0, 0.5, 0.0]
