"""Where the auxiliaries of gradient learning are fitted, as the loop sees it; and the simplest place, this process.

Workers of a cluster are launch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ot_ray.cola import Fits, Pair, Taken
from ot_ray.errors import GradientLearningError, NotFiniteError


class Fitting(Protocol):
    """Where auxiliaries are fitted: here, or anywhere that batches can be sent to.

    An owner is whoever has an auxiliary: a customer, or `joint`. Batches are numbered 0, 1, 2 and so on.
    """

    def submit(self, number: int, pairs: Mapping[str, Mapping[str, Pair] | None], flush: bool = False) -> None:
        """Hand over a batch of every owner (None: it has no rows there); returns before it is fitted.

        Args:
            flush: fit what the interval has left after it.
        """
        ...

    def taken(self, number: int) -> dict[str, Taken]:
        """Wait until a batch that was submitted is fitted; what became of it, by owner. Each is asked for once.

        A batch that is refused, for x or g that is not finite, is left out, and its answer says so.
        """
        ...

    def states(self) -> dict[str, Any]:
        """`Fits.state_dict` by owner, after all that was submitted."""
        ...

    def load(self, states: Mapping[str, Any]) -> None:
        """Go on from `states`."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class FittingHere(Fitting):
    """Fits in this process, as batches are handed over.

    Args:
        fits: of every owner. Their auxiliaries are fitted in place; the mode has others, or copies.
    """

    def __init__(self, fits: Fits) -> None:
        self._fits = fits
        self._taken: dict[int, dict[str, Taken]] = {}

    def submit(self, number: int, pairs: Mapping[str, Mapping[str, Pair] | None], flush: bool = False) -> None:
        self._taken[number] = {
            name: take_or_leave_out(self._fits, name, number, own, flush) for name, own in pairs.items()
        }

    def taken(self, number: int) -> dict[str, Taken]:
        if number not in self._taken:
            raise GradientLearningError(f"batch {number} was not submitted, or asked for already")
        return self._taken.pop(number)

    def states(self) -> dict[str, Any]:
        return {name: self._fits.state_dict(name) for name in self._fits.customers}

    def load(self, states: Mapping[str, Any]) -> None:
        self._taken.clear()
        for name, state in states.items():
            self._fits.load_state_dict(name, state)

    def close(self) -> None:
        self._taken.clear()


def take_or_leave_out(
    fits: Fits, customer: str, number: int, pairs: Mapping[str, Pair] | None, flush: bool = False
) -> Taken:
    """`Fits.take`, but a batch that is not finite is left out, which the answer says, so that a run goes on.

    Raises:
        GradientLearningError: as `Fits.take`.
    """
    try:
        return fits.take(customer, number, pairs, flush)
    except NotFiniteError as error:
        left_out = fits.take(customer, number, None, flush)
        return Taken(left_out.number, left_out.steps, left_out.tensors, refused=str(error))
