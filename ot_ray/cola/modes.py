"""Modes: whose auxiliary the rows of a pass go through, and to whom their gradients belong (ColA, section 3.3).

The products are in products.py; capturing is left to taps.py, fitting to fitting.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ot_ray.cola.auxiliaries import Auxiliary
from ot_ray.cola.products import RowSums, SiteSums, Summands
from ot_ray.errors import GradientLearningError, MergeError

JOINT = "joint"
"""The name under which the pairs of mode joint come."""


class Mode:
    """Auxiliaries by their customers' names, and how a forward pass uses them. Kinds and ranks may differ.

    Their tensors are read when a pass runs, so that a fit in place is seen by the next one; a pass brings those of
    other devices to its own, site by site, and keeps none of them.

    Args:
        auxiliaries: by customer, the one that is fitted to its rows.
        through: by customer, what its rows go through: shares and auxiliaries.
        everywhere: all rows go through one and the same sum, those of nobody among them.
    """

    def __init__(
        self, auxiliaries: Mapping[str, Auxiliary], through: Mapping[str, Summands], everywhere: bool = False
    ) -> None:
        if not auxiliaries:
            raise GradientLearningError("a mode has no auxiliaries; give one for each customer")
        self.auxiliaries = dict(auxiliaries)
        self.names = sorted(self.auxiliaries)
        self._everywhere = everywhere
        # Customers whose sums are alike share one, so that their rows go as one.
        sums: dict[tuple[tuple[float, int], ...], Summands] = {}
        keys = {name: tuple((share, id(own)) for share, own in through[name]) for name in self.names}
        for name, key in keys.items():
            sums.setdefault(key, list(through[name]))
        numbers = {key: number for number, key in enumerate(sums)}
        self._sums, self._numbers = list(sums.values()), {name: numbers[key] for name, key in keys.items()}
        self._at: dict[str, SiteSums | None] = {}

    needs_rows: bool = True
    """A pass has to say whose each row is."""

    def owner(self, customer: str | None) -> str | None:
        """Whose auxiliary is fitted to a customer's row; None for nobody's."""
        return customer

    def share(self, owner: str) -> float:
        """What the owner's output is multiplied by on its way into the owner's own rows."""
        summands = self._sums[self._numbers[owner]]
        return sum(share for share, auxiliary in summands if auxiliary is self.auxiliaries[owner])

    def rows(self, owners: Sequence[str | None], device: torch.device) -> RowSums | None:
        """Which sum the rows of a pass go through, given the owner of each; None where all go through the same."""
        if self._everywhere:
            return None
        return RowSums([None if owner is None else self._numbers[owner] for owner in owners], device)

    def delta(self, site: str, x: Tensor, rows: RowSums | None) -> Tensor | None:
        """What is added to a site's output; None for nothing. No auxiliary's tensor is part of its graph, x is.

        Args:
            x: what the module is called with, rows first: [B, ..., I] or [B * T, I].
            rows: as `rows` gives them.
        """
        if site not in self._at:
            found = next((own.sites[site] for summands in self._sums for _, own in summands if site in own.sites), None)
            self._at[site] = None if found is None else SiteSums(found, self._sums)
        at = self._at[site]
        return None if at is None else at.delta(x, rows)

    def summands(self) -> Summands:
        """The auxiliaries that weights hold once they are merged, each with its share.

        Raises:
            MergeError: rows of one pass need different weights.
        """
        if len(self._sums) > 1:
            raise MergeError(
                f"{len(self.auxiliaries)} customers' rows need weights of their own; leave them unmerged, merge one "
                "customer at a time, or use mode joint or collaboration"
            )
        return self._sums[0]


class Joint(Mode):
    """One auxiliary for all rows, fitted to all of them. Its pairs come under the name `joint`."""

    needs_rows = False

    def __init__(self, auxiliary: Auxiliary) -> None:
        super().__init__({JOINT: auxiliary}, {JOINT: [(1.0, auxiliary)]}, everywhere=True)

    def owner(self, customer: str | None) -> str | None:
        return JOINT


class PerCustomer(Mode):
    """Each customer's rows through a weighted sum of auxiliaries of its own choice, in one pass for all.

    Args:
        auxiliaries: by customer, the one that is fitted to its rows; several customers may have one in common.
        through: by customer, what its rows go through: shares and auxiliaries, its own among them.

    Raises:
        GradientLearningError: the two are not of the same customers, or a customer's own is not among its sum.
    """

    def __init__(self, auxiliaries: Mapping[str, Auxiliary], through: Mapping[str, Summands]) -> None:
        if through.keys() != auxiliaries.keys():
            raise GradientLearningError(
                f"sums are for {sorted(through)}, customers are {sorted(auxiliaries)}; give one for each"
            )
        for name, own in auxiliaries.items():
            if all(auxiliary is not own for _, auxiliary in through[name]):
                raise GradientLearningError(
                    f"the rows of {name} do not go through its own auxiliary; put it in its sum"
                )
        super().__init__(auxiliaries, through)


class Alone(PerCustomer):
    """Each customer's rows through its own auxiliary, fitted to them alone."""

    def __init__(self, auxiliaries: Mapping[str, Auxiliary]) -> None:
        super().__init__(auxiliaries, {name: [(1.0, auxiliary)] for name, auxiliary in auxiliaries.items()})


class Collaboration(Mode):
    """Every row through the weighted sum of all customers' auxiliaries; each is fitted to its own customer's rows.

    Args:
        weights: of each customer; unset, their mean.

    Raises:
        GradientLearningError: the weights are not those of the same customers, or not finite.
    """

    def __init__(self, auxiliaries: Mapping[str, Auxiliary], weights: Mapping[str, float] | None = None) -> None:
        given = {name: 1 / len(auxiliaries) for name in auxiliaries} if weights is None else dict(weights)
        if given.keys() != auxiliaries.keys():
            raise GradientLearningError(
                f"weights are for {sorted(given)}, customers are {sorted(auxiliaries)}; give one for each"
            )
        if not torch.tensor(list(given.values()), dtype=torch.float64).isfinite().all():
            raise GradientLearningError(f"weights are {given}; give finite numbers")
        self.weights = given
        total = [(given[name], auxiliaries[name]) for name in sorted(auxiliaries)]
        super().__init__(auxiliaries, dict.fromkeys(auxiliaries, total), everywhere=True)
