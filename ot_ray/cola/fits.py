"""The fitters of some customers in one place: each takes its batches in order, and each batch once.

Where that place is (this process, a worker on another machine, a service's database) is the caller's affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ot_ray.cola.auxiliaries import Auxiliary
from ot_ray.cola.fitting import Fitter, FittingConfig
from ot_ray.cola.pairs import Pair
from ot_ray.errors import GradientLearningError


class FitConfig(FittingConfig):
    """How a customer's auxiliary is fitted, wherever that is."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What makes a step of the gradient."""
    lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of every tensor."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of SGD."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    warmup_fits: int = Field(default=0, ge=0)
    """Fits over which the rate rises linearly."""
    fits: int = Field(default=1, ge=1)
    """Fits until the rate would be 0, where it falls; later ones stay at the last rate above 0."""


def make_fitter(auxiliary: Auxiliary, config: FitConfig) -> Fitter:
    """A fitter as a configuration says."""
    schedule: Callable[[Optimizer], LambdaLR] | None = None
    if config.schedule != "constant" or config.warmup_fits:
        schedule = partial(LambdaLR, lr_lambda=partial(_share, config))
    return Fitter(auxiliary, partial(_optimizer, config), config, schedule)


def _optimizer(config: FitConfig, tensors: list[Tensor]) -> Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(tensors, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(tensors, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def _share(config: FitConfig, fit: int) -> float:
    if fit < config.warmup_fits:
        return (fit + 1) / config.warmup_fits
    if config.schedule == "constant":
        return 1.0
    left = max(1, config.fits - config.warmup_fits)
    progress = min(fit - config.warmup_fits, left - 1) / left
    if config.schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))))


@dataclass(frozen=True)
class Taken:
    """What became of a batch."""

    number: int
    """Of the last batch that was taken in."""
    steps: int
    """Fits that were made so far."""
    tensors: dict[str, Tensor] | None
    """The auxiliary's, if this batch made a fit; else they are what they were."""
    refused: str | None = None
    """Why the batch was left out, where whoever asked for it goes on without it; `Fits.take` itself raises instead."""


class Fits:
    """The fitters of some customers.

    Batches of a customer are numbered 0, 1, 2 and so on. One that comes again is not taken in again, and is answered
    as the first time as far as the state still tells (its tensors are the present ones); one too early is refused. So
    whoever does not hear an answer asks again.

    Args:
        fitters: by customer.
    """

    def __init__(self, fitters: Mapping[str, Fitter]) -> None:
        self._fitters = dict(fitters)
        self._next = dict.fromkeys(self._fitters, 0)

    @property
    def customers(self) -> list[str]:
        """Whose fitters are here."""
        return list(self._fitters)

    def auxiliary(self, customer: str) -> Auxiliary:
        """A customer's auxiliary, as fitted so far.

        Raises:
            GradientLearningError: an unknown customer.
        """
        return self._fitter(customer).auxiliary

    def take(self, customer: str, number: int, pairs: Mapping[str, Pair] | None, flush: bool = False) -> Taken:
        """Take in a batch; the one that fills the interval makes the fit.

        Args:
            number: of the batch, by this customer's own count.
            pairs: by site; None where the customer had no rows, which counts as a batch without gradients.
            flush: fit what is there afterwards, as at the end of an epoch.

        Raises:
            GradientLearningError: an unknown customer, a batch that is not the next one, or pairs that do not fit.
            NotFiniteError: x, g or the gradient holds NaN or infinity. The batch is refused, all is as it was: its
                number may be used again for another batch, or for None, which leaves it out.
        """
        fitter, awaited = self._fitter(customer), self._next[customer]
        if number > awaited:
            raise GradientLearningError(
                f"batch {number} of {customer} came, but batch {awaited} is the next; give them in order"
            )
        if number < awaited:
            return Taken(awaited - 1, fitter.steps, _copies(fitter.auxiliary))
        fitted = False if pairs is None else fitter.collect(pairs)
        fitted = (flush and fitter.flush()) or fitted
        self._next[customer] = number + 1
        return Taken(number, fitter.steps, _copies(fitter.auxiliary) if fitted else None)

    def state_dict(self, customer: str) -> dict[str, Any]:
        """All that a customer's next batch depends on, in tensors and plain values of its own (`pack_state`)."""
        return {"next": self._next[customer], "fitter": self._fitter(customer).state_dict()}

    def load_state_dict(self, customer: str, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; errors are `Fitter.load_state_dict`'s, after which nothing has changed."""
        self._fitter(customer).load_state_dict(state["fitter"])
        self._next[customer] = int(state["next"])

    def _fitter(self, customer: str) -> Fitter:
        if customer not in self._fitters:
            raise GradientLearningError(f"customer {customer!r} is not fitted here; {', '.join(self._fitters)} are")
        return self._fitters[customer]


def _copies(auxiliary: Auxiliary) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in auxiliary.tensors.items()}
