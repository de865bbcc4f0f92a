"""From one row of logits to one token: temperature, nucleus, penalties and biases, with a seed of its own.

Producing the logits is left to decoding.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the fields mean what they mean at OpenAI."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to what is added to its logit."""


class Sampler:
    """Chooses the tokens of one choice, on the CPU and from its own generator.

    The same seed gives the same tokens whatever else runs at the same time.
    """

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)
        self._bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._counts: Counter[int] = Counter()

    def pick(self, logits_V: torch.Tensor) -> int:
        """Choose a token from float32 logits of shape (vocabulary,); they are left as they were."""
        scores = self._adjusted(logits_V)
        if self._sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = self._draw(torch.softmax(scores / self._sampling.temperature, dim=-1))
        self._counts[token] += 1
        return token

    def _adjusted(self, logits_V: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        scores = logits_V.clone()
        scores[self._bias_ids] += self._bias
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            scores[list(self._counts)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        return scores

    def _draw(self, probabilities: torch.Tensor) -> int:
        if self._sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            # A token stays if those before it hold less than top_p, so the likeliest always stays.
            ordered[1:][ordered.cumsum(0)[:-1] >= self._sampling.top_p] = 0
            return int(order[torch.multinomial(ordered, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
