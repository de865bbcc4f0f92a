"""A plug-in model against the base model on a fixed text, before anybody is answered with it.

How far apart they may be is the caller's to say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = (
    "The river rises in the hills to the north of the town and flows slowly towards the sea. In spring, when the snow "
    "melts, it floods the meadows, and the people who live there move their animals to higher ground. A bridge of "
    "stone, which is four hundred years old, joins the two halves of the market square. Every Saturday farmers sell "
    "bread, cheese and apples there. Once a year there is a fair with music, and the children are allowed to stay up "
    "until midnight.\n\n"
    "def total(prices):\n    result = 0\n    for price in prices:\n        result += price\n    return result\n"
)
"""Plain prose and a little code, of no data set."""
_MOST_TOKENS = 256


@dataclass(frozen=True)
class CanaryReport:
    """What a canary run found."""

    finite: bool
    """Whether every logit of the plug-in model is."""
    base_perplexity: float
    perplexity: float
    """Per token, teacher-forced; infinite where it is not finite."""

    @property
    def ratio(self) -> float:
        """The plug-in model's perplexity over the base model's."""
        return self.perplexity / self.base_perplexity


@torch.inference_mode()
def compare(base: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CanaryReport:
    """Score the canary text by both models."""
    ids = torch.tensor([list(tokenizer(TEXT)["input_ids"])[:_MOST_TOKENS]])  # type: ignore[arg-type]
    most = getattr(base.config, "max_position_embeddings", None) or _MOST_TOKENS
    ids = ids[:, :most].to(base.device)
    _, base_perplexity = _perplexity(base, ids)
    finite, perplexity = _perplexity(model, ids)
    return CanaryReport(finite, base_perplexity, perplexity)


def _perplexity(model: PreTrainedModel, ids: torch.Tensor) -> tuple[bool, float]:
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    finite = bool(logits.isfinite().all())
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    return finite, math.exp(min(loss, 700.0)) if finite else math.inf
