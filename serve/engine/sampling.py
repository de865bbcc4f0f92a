"""From logits to tokens, for all rows of a batch at once: temperature, nucleus, penalties and biases.

Each row has random numbers of its own. Producing logits is batching.py's part. Letters: B rows, V vocabulary."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
    _biases: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def bias_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 [N], and what is added to their logits, float32 [N]; made once."""
        if device not in self._biases:
            ids, values = list(self.logit_bias), list(self.logit_bias.values())
            self._biases[device] = (
                torch.tensor(ids, dtype=torch.long, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )
        return self._biases[device]


class Sampler:
    """What the choice of one row's tokens depends on beside the logits: settings, tokens so far, random numbers.

    The same seed gives the same tokens whatever else runs at the same time, as far as the logits are the same.
    """

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.sampling = sampling
        self._random = random.Random(seed)
        self._drawn: float | None = None
        self.counts: torch.Tensor | None = None
        """How often each token was chosen, float32 [V], where penalties need it."""

    @property
    def is_penalized(self) -> bool:
        """Whether tokens that came before are less likely, or likelier."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def draw(self) -> float:
        """One number of [0, 1), the same until `move_on`, so that a choice that failed can be made again."""
        if self._drawn is None:
            self._drawn = self._random.random()
        return self._drawn

    def move_on(self, token: int) -> None:
        """Go on to the next token, since this one was chosen."""
        if self.counts is not None:
            self.counts[token] += 1
        self._drawn = None

    def pick(self, logits_V: torch.Tensor) -> int:
        """Choose a token from float32 logits of shape (vocabulary,) as `pick` chooses it in a batch, and move on."""
        token = int(pick([self], logits_V[None])[0])
        self.move_on(token)
        return token


def pick(samplers: Sequence[Sampler], logits_BV: torch.Tensor) -> torch.Tensor:
    """Choose a token for every row.

    Args:
        samplers: one a row; the caller moves each on by its token.
        logits_BV: float32; they are left as they were.

    Returns:
        Token ids, int64 [B], on the logits' device.
    """
    scores = _adjusted(samplers, logits_BV)
    tokens = scores.argmax(-1)
    for nucleus in (False, True):
        rows = [
            row
            for row, sampler in enumerate(samplers)
            if sampler.sampling.temperature and (sampler.sampling.top_p < 1) == nucleus
        ]
        if rows:
            chosen = [samplers[row] for row in rows]
            every = len(rows) == len(samplers)
            drawn = _drawn(chosen, scores if every else scores[rows], nucleus)
            tokens = drawn if every else tokens.index_put((torch.tensor(rows, device=tokens.device),), drawn)
    return tokens


def _adjusted(samplers: Sequence[Sampler], logits_BV: torch.Tensor) -> torch.Tensor:
    scores, device = logits_BV, logits_BV.device
    biased = [row for row, sampler in enumerate(samplers) if sampler.sampling.logit_bias]
    if biased:
        scores = scores.clone()
        for row in biased:
            scores[row].index_add_(0, *samplers[row].sampling.bias_on(device))
    penalized = [row for row, sampler in enumerate(samplers) if sampler.is_penalized]
    if penalized:
        counts = torch.stack([_counts(samplers[row], scores[row]) for row in penalized])
        presence, frequency = (
            torch.tensor([[getattr(samplers[row].sampling, name)] for row in penalized], device=device)
            for name in ("presence_penalty", "frequency_penalty")
        )
        rows = torch.tensor(penalized, device=device)
        scores = scores.index_put((rows,), scores[rows] - presence * (counts > 0) - frequency * counts)
    return scores


def _counts(sampler: Sampler, like: torch.Tensor) -> torch.Tensor:
    if sampler.counts is None:
        sampler.counts = torch.zeros_like(like)
    return sampler.counts


def _drawn(samplers: Sequence[Sampler], scores: torch.Tensor, nucleus: bool) -> torch.Tensor:
    """Tokens [B], each where its row's random number falls among the probabilities in a row."""
    temperatures = torch.tensor([[sampler.sampling.temperature] for sampler in samplers], device=scores.device)
    draws = torch.tensor([[sampler.draw()] for sampler in samplers], dtype=torch.float64, device=scores.device)
    probabilities, order = torch.softmax(scores / temperatures, dim=-1), None
    if nucleus:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        most = torch.tensor([[sampler.sampling.top_p] for sampler in samplers], device=scores.device)
        # A token stays if those before it hold less than top_p, so the likeliest always stays.
        before = torch.nn.functional.pad(probabilities.cumsum(-1)[:, :-1], (1, 0), value=-1.0)
        probabilities = probabilities.where(before < most, 0.0)
    # Summed in double precision: the tail of a large vocabulary would drown in a float's rounding.
    heaps = probabilities.double().cumsum(-1)
    places = torch.searchsorted(heaps, draws * heaps[:, -1:], right=True).clamp_(max=scores.shape[-1] - 1)
    return (places if order is None else order.gather(-1, places)).squeeze(-1)
