"""What "auto" comes to once a job's examples are counted: epochs, batch size and learning rate.

Counting is left to validation.py; running with the numbers is the job's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ot_ray.config import Config
from ot_ray.model import Method

BASE_LEARNING_RATES: dict[Method, float] = {"full": 1e-4, "lora": 2e-4, "bottleneck": 1e-3, "bitfit": 1e-3}
"""Peak rate of AdamW for a multiplier of 1: the fewer weights a method tunes, the higher the rate they take (the
papers of LoRA, of Houlsby's adapters and of BitFit; `full` as `jobs.tune` ships it)."""

EPOCHS = 3
FEWEST_SEEN, MOST_SEEN = 100, 25_000
MOST_EPOCHS, LARGEST_BATCH = 25, 256
BATCH_SHARE = 0.002


class ResolvedHyperparameters(Config):
    """What a job runs with: numbers only."""

    n_epochs: int = Field(ge=1)
    """Passes over the training examples."""
    batch_size: int = Field(ge=1)
    """Examples an optimiser step."""
    learning_rate_multiplier: float = Field(gt=0)
    """Times the base rate of the tuning method."""
    learning_rate: float = Field(gt=0)
    """The peak rate itself."""
    tuning_method: Method
    """What is trained inside the adapter layers."""


def resolve(
    asked: Mapping[str, Any],
    *,
    tuning_method: Method,
    examples: int,
    tokens: int = 0,
    most_tokens: int | None = None,
    base_rates: Mapping[Method, float] = BASE_LEARNING_RATES,
) -> ResolvedHyperparameters:
    """Put numbers in the place of "auto"; numbers that were asked for stay as they are.

    - epochs: 3, but so many that 100 examples are seen (25 at most), and so few that 25,000 are not passed (1 at
      least); then as few as keep epochs times tokens within `most_tokens`, where that is possible.
    - batch size: 0.2 % of the examples, within 1..256, and never more than there are.
    - learning rate multiplier: 1.

    Args:
        asked: `n_epochs`, `batch_size`, `learning_rate_multiplier`; one that is missing counts as "auto".
        examples: how many the training file holds.
        tokens: trained in one pass over them.
        most_tokens: more than that, over all epochs, is never chosen for the asker.
        base_rates: peak learning rate of each method for a multiplier of 1.
    """
    epochs, batch = asked.get("n_epochs", "auto"), asked.get("batch_size", "auto")
    multiplier = asked.get("learning_rate_multiplier", "auto")
    factor = 1.0 if multiplier == "auto" else float(multiplier)
    return ResolvedHyperparameters(
        n_epochs=_auto_epochs(examples, tokens, most_tokens) if epochs == "auto" else epochs,
        batch_size=_auto_batch(examples) if batch == "auto" else batch,
        learning_rate_multiplier=factor,
        learning_rate=factor * base_rates[tuning_method],
        tuning_method=tuning_method,
    )


def _auto_epochs(examples: int, tokens: int, most_tokens: int | None) -> int:
    examples = max(examples, 1)
    enough = min(-(-FEWEST_SEEN // examples), MOST_EPOCHS)
    epochs = min(max(EPOCHS, enough), max(MOST_SEEN // examples, 1))
    if most_tokens is not None and tokens:
        epochs = min(epochs, max(most_tokens // tokens, 1))
    return epochs


def _auto_batch(examples: int) -> int:
    return max(1, min(round(BATCH_SHARE * examples), LARGEST_BATCH, examples))
