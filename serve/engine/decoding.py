"""The decode loop: one sequence, one token a step, over a key-value cache; and scores of given tokens.

When to stop is the caller's; the loop can be left after any token. V is the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from serve.engine.sampling import Sampler

# Rows of logits that are turned into float32 probabilities at once, to bound memory.
_ROWS = 128


@dataclass(frozen=True)
class TokenScore:
    """A token with its log-probability and those of the likeliest tokens in its place."""

    token: int
    logprob: float | None
    """None where nothing precedes the token."""
    top: dict[int, float]
    """Token id to log-probability: the likeliest first, and the token itself."""


def decode(model: PreTrainedModel, prompt: Sequence[int], sampler: Sampler) -> Iterator[tuple[int, torch.Tensor]]:
    """Continue a prompt without end.

    Args:
        prompt: at least one token id.

    Yields:
        A token and the float32 logits on the CPU, of shape (V,), that it was chosen from.
    """
    cache = DynamicCache(config=model.config)
    ids = list(prompt)
    while True:
        logits_V = _forward(model, ids, cache)
        token = sampler.pick(logits_V)
        yield token, logits_V
        ids = [token]


@torch.inference_mode()
def _forward(model: PreTrainedModel, ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    input_ids = torch.tensor([ids], device=model.device)
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].float().cpu()


def score(token: int, logits_V: torch.Tensor, top: int) -> TokenScore:
    """Score a token by the logits in its place, with the `top` likeliest beside it."""
    return _score(token, torch.log_softmax(logits_V, dim=-1), top)


@torch.inference_mode()
def score_prompt(model: PreTrainedModel, prompt: Sequence[int], top: int) -> list[TokenScore]:
    """Score every token of a prompt by those before it; the first has no score."""
    input_ids = torch.tensor([list(prompt)], device=model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[0]
    scores = [TokenScore(prompt[0], None, {})]
    for start in range(0, len(prompt) - 1, _ROWS):
        rows = torch.log_softmax(logits[start : min(start + _ROWS, len(prompt) - 1)].float().cpu(), dim=-1)
        scores += [_score(prompt[start + i + 1], row, top) for i, row in enumerate(rows)]
    return scores


def _score(token: int, logprobs_V: torch.Tensor, top: int) -> TokenScore:
    values, ids = logprobs_V.topk(min(top, logprobs_V.numel()))
    best = dict(zip(ids.tolist(), values.tolist(), strict=True))
    logprob = float(logprobs_V[token])
    return TokenScore(token, logprob, {**best, token: logprob} if top else {})
