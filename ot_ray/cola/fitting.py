"""Fitting an auxiliary to what the taps captured: one optimiser step an interval, wherever the auxiliary is.

Decoupled functional gradient descent (ColA, arXiv 2404.13844, Algorithm 1). How pairs get here is the caller's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ot_ray.cola.auxiliaries import Auxiliary, check_tensors
from ot_ray.cola.pairs import Pair
from ot_ray.config import Config
from ot_ray.errors import GradientLearningError, NotFiniteError


class FittingConfig(Config):
    """How often an auxiliary is fitted, and to what."""

    interval: int = Field(default=1, ge=1)
    """Batches collected for one step of the optimiser (the paper's I)."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the batches of an interval: their sum, as in the paper, or their mean, whose size the interval leaves be."""


class Fitter:
    """Fits one customer's auxiliary, in place.

    The gradients of an interval are added up as its batches come, which is the gradient of the surrogate over all of
    them, since the auxiliary stands still meanwhile; so nothing is kept of a batch, whatever the interval.

    Args:
        auxiliary: its tensors get gradients from here on.
        optimizer: makes the optimiser of a list of tensors, such as `lambda tensors: torch.optim.SGD(tensors, lr=0.1)`;
            any that steps by the gradients alone, without a closure (LBFGS does not).
        schedule: makes its schedule, which steps once a fit.

    Raises:
        GradientLearningError: the optimiser wants a closure.
    """

    def __init__(
        self,
        auxiliary: Auxiliary,
        optimizer: Callable[[list[Tensor]], Optimizer],
        config: FittingConfig | None = None,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        self.auxiliary, self.config = auxiliary, config or FittingConfig()
        for tensor in auxiliary.tensors.values():
            tensor.requires_grad_(True)
        self.optimizer = optimizer(list(auxiliary.tensors.values()))
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise GradientLearningError(
                f"{type(self.optimizer).__name__} calls a closure, but a fit is one step by one gradient; use another "
                "optimiser"
            )
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.steps = 0
        """Fits that were made."""
        self.collected = 0
        """Batches of the interval that is under way."""
        self._gradients: dict[str, Tensor] = {}

    def collect(self, pairs: Mapping[str, Pair]) -> bool:
        """Take in one batch; the one that fills the interval makes the fit.

        Args:
            pairs: by site, for every site of the auxiliary; on any device, in any float precision.

        Returns:
            Whether a fit was made.

        Raises:
            GradientLearningError: other sites, or shapes that do not fit them.
            NotFiniteError: x, g or the gradient holds NaN or infinity. The batch is refused; the auxiliary, the
                optimiser and the rest of the interval are as they were.
        """
        found = gradients(self.auxiliary, pairs)
        for name, gradient in found.items():
            if not gradient.isfinite().all():
                raise NotFiniteError(f"the gradient of {name} is not finite; the batch is refused; scale the loss down")
        self._gradients = {
            name: gradient if not self.collected else self._gradients[name] + gradient
            for name, gradient in found.items()
        }
        self.collected += 1
        return self.collected == self.config.interval and self.flush()

    def flush(self) -> bool:
        """Fit what is left of an interval, such as at the end of an epoch.

        Returns:
            Whether there was anything.
        """
        if not self.collected:
            return False
        scale = 1 / self.collected if self.config.reduction == "mean" else 1.0
        for name, tensor in self.auxiliary.tensors.items():
            tensor.grad = self._gradients[name] * scale if scale != 1.0 else self._gradients[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()
        self._gradients, self.collected, self.steps = {}, 0, self.steps + 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that the next fit depends on, in tensors and plain values of its own; mid-interval, too."""
        return copy.deepcopy(
            {
                "auxiliary": {name: tensor.detach() for name, tensor in self.auxiliary.tensors.items()},
                "gradients": self._gradients,
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "collected": self.collected,
                "steps": self.steps,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a fitter of the same auxiliary, optimiser and schedule.

        Raises:
            GradientLearningError: it is of another kind, rank or choice of sites, or has a schedule where this one has
                none. Nothing has changed.
            NotFiniteError: it holds NaN or infinity. Nothing has changed.
            ValueError: the optimiser's own, if its state is of another optimiser.
        """
        if (state["schedule"] is None) != (self.schedule is None):
            raise GradientLearningError("the state and this fitter do not both have a schedule; make it as it was made")
        for tensors in (state["auxiliary"], state["gradients"]) if state["collected"] else (state["auxiliary"],):
            check_tensors(tensors, self.auxiliary.tensors)
        state = copy.deepcopy(dict(state))
        self.optimizer.load_state_dict(state["optimizer"])
        self.auxiliary.load(state["auxiliary"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self._gradients = {
            name: gradient.to(self.auxiliary.tensors[name]) for name, gradient in state["gradients"].items()
        }
        self.collected, self.steps = state["collected"], state["steps"]


def surrogate(output: Tensor, g: Tensor) -> Tensor:
    """``0.5 * sum((f(x) - stopgrad(f(x) - g))²)``, the paper's quadratic loss of a site, scalar.

    Its gradient by the auxiliary is ``J(f)ᵀ g``, that of back-propagation, but rounded: where f(x) is far larger than
    g, the difference keeps few digits of g. `gradients` computes the product itself.

    Args:
        output: f(x).
        g: of the same shape.
    """
    return 0.5 * (output - (output - g).detach()).square().sum()


def gradients(auxiliary: Auxiliary, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The gradient of the surrogate, summed over sites, by each tensor of an auxiliary. Nothing changes.

    Raises:
        GradientLearningError: other sites than the auxiliary's, or shapes that do not fit them.
        NotFiniteError: x or g holds NaN or infinity.
    """
    if pairs.keys() != auxiliary.sites.keys():
        odd = sorted(pairs.keys() ^ auxiliary.sites.keys())[0]
        side = "no pair came for" if odd in auxiliary.sites else "a pair came for"
        raise GradientLearningError(f"{side} site {odd}; give one for each of the auxiliary's sites, and no other")
    for site, pair in pairs.items():
        for name, tensor in (("x", pair.x), ("g", pair.g)):
            if not tensor.isfinite().all():
                raise NotFiniteError(f"{name} at site {site} holds NaN or infinity; the batch is refused")
    found: dict[str, Tensor] = {}
    for site, pair in pairs.items():
        found |= _gradients_at(auxiliary, site, pair)
    return found


def _gradients_at(auxiliary: Auxiliary, site: str, pair: Pair) -> dict[str, Tensor]:
    found = auxiliary.sites[site]
    parts = {part: tensor.detach() for part, tensor in auxiliary.parts(site).items()}
    like = next(iter(parts.values()))
    factored = auxiliary.config.kind == "low_rank" and found.layout == "linear"
    try:
        shape, back = (_factored if factored else _traced)(auxiliary, site, pair.x.to(like.device), parts)
    except (RuntimeError, IndexError) as error:
        raise GradientLearningError(
            f"x at site {site} is {pair.x.dtype} {[*pair.x.shape]}, which {found} does not take; give what its taps "
            f"captured ({str(error).splitlines()[0]})"
        ) from None
    if shape != pair.g.shape:
        raise GradientLearningError(
            f"g at site {site} is {[*pair.g.shape]}, but f(x) is {[*shape]}; give what its taps captured"
        )
    return {f"{site}.{part}": gradient for part, gradient in zip(parts, back(pair.g.to(like)), strict=True)}


_Back = Callable[[Tensor], Sequence[Tensor]]


def _traced(auxiliary: Auxiliary, site: str, x: Tensor, parts: Mapping[str, Tensor]) -> tuple[torch.Size, _Back]:
    """The shape of f(x), and what makes the gradients by its parts of g, by autograd."""
    leaves = {part: tensor.requires_grad_(True) for part, tensor in parts.items()}
    with torch.enable_grad():
        output = auxiliary.delta(site, x, leaves)
    return output.shape, lambda g: torch.autograd.grad(output, list(leaves.values()), g)


def _factored(auxiliary: Auxiliary, site: str, x: Tensor, parts: Mapping[str, Tensor]) -> tuple[torch.Size, _Back]:
    """The same for two factors, without a graph, which costs more than the products of a small fit."""
    first, second = parts.values()
    x, scale = x.to(first.dtype), auxiliary.config.scale
    inner = F.linear(x, first)

    def back(g: Tensor) -> tuple[Tensor, Tensor]:
        rows, middle, slopes = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, inner, g))
        return ((slopes @ second) * scale).mT @ rows, slopes.mT @ (middle * scale)

    return torch.Size((*x.shape[:-1], second.shape[0])), back
