"""Log-probabilities of tokens that were chosen, and of tokens that were given.

Letters: N tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Rows of logits that are computed, and turned into float32 probabilities, at once, to bound memory.
_ROWS = 128


@dataclass(frozen=True)
class TokenScore:
    """A token with its log-probability and those of the likeliest tokens in its place."""

    token: int
    logprob: float | None
    """None where nothing precedes the token."""
    top: dict[int, float]
    """Token id to log-probability, the likeliest first."""


def scores_of(tokens_N: torch.Tensor, logits_NV: torch.Tensor, top: int) -> list[TokenScore]:
    """Score tokens by the float32 logits in their places, with the `top` likeliest beside each."""
    logprobs = torch.log_softmax(logits_NV, dim=-1)
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    own = logprobs.gather(-1, tokens_N[:, None]).squeeze(-1)
    lists = (tokens_N.tolist(), own.tolist(), ids.tolist(), values.tolist())
    return [
        TokenScore(token, logprob, dict(zip(best, likely, strict=True)))
        for token, logprob, best, likely in zip(*lists, strict=True)
    ]


def score_prompt(
    logits_of: Callable[[torch.Tensor], torch.Tensor], prompt: Sequence[int], top: int
) -> list[TokenScore]:
    """Score every token of a prompt by those before it; the first has no score.

    Args:
        logits_of: the model: the token ids [1, T] of one stretch of the prompt after another to logits [1, T, V].
    """
    ids = torch.tensor([list(prompt)])
    scores = [TokenScore(prompt[0], None, {})]
    for start in range(0, len(prompt) - 1, _ROWS):
        rows = logits_of(ids[:, start : min(start + _ROWS, len(prompt) - 1)])[0].float()
        following = ids[0, start + 1 : start + 1 + len(rows)].to(rows.device)
        scores += scores_of(following, rows, top)
    return scores
