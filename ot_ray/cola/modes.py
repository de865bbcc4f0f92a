"""Modes: whose auxiliary the rows of a pass go through, and to whom their gradients belong (ColA, section 3.3).

Capturing is left to taps.py, fitting to fitting.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ot_ray.cola.auxiliaries import Auxiliary
from ot_ray.errors import GradientLearningError, MergeError
from ot_ray.model.multi_adapter import RowGroups

JOINT = "joint"
"""The name under which the pairs of mode joint come."""


class Mode(ABC):
    """Auxiliaries by their customers' names, and how a forward pass uses them. Kinds and ranks may differ.

    Their tensors are read when a pass runs, so that a fit in place is seen by the next one.
    """

    def __init__(self, auxiliaries: Mapping[str, Auxiliary]) -> None:
        if not auxiliaries:
            raise GradientLearningError("a mode has no auxiliaries; give one for each customer")
        self.auxiliaries = dict(auxiliaries)
        self.names = sorted(self.auxiliaries)

    needs_rows: bool = True
    """A pass has to say whose each row is."""

    def owner(self, customer: str | None) -> str | None:
        """Whose auxiliary is fitted to a customer's row; None for nobody's."""
        return customer

    def share(self, owner: str) -> float:
        """What the owner's output is multiplied by on its way into the owner's own rows."""
        return 1.0

    @abstractmethod
    def delta(self, site: str, x: Tensor, groups: RowGroups | None) -> Tensor | None:
        """What is added to a site's output; None for nothing. No auxiliary's tensor is part of its graph, x is.

        Args:
            x: what the module is called with, rows first: [B, ..., I] or [B * T, I].
            groups: rows by owner, numbered as in `names` from 1 on; 0 is nobody's.
        """

    @abstractmethod
    def summands(self) -> list[tuple[float, Auxiliary]]:
        """The auxiliaries that weights hold once they are merged, each with its share.

        Raises:
            MergeError: rows of one pass need different weights.
        """


class Joint(Mode):
    """One auxiliary for all rows, fitted to all of them. Its pairs come under the name `joint`."""

    needs_rows = False

    def __init__(self, auxiliary: Auxiliary) -> None:
        super().__init__({JOINT: auxiliary})

    def owner(self, customer: str | None) -> str | None:
        return JOINT

    def delta(self, site: str, x: Tensor, groups: RowGroups | None) -> Tensor | None:
        return _delta(self.auxiliaries[JOINT], site, x)

    def summands(self) -> list[tuple[float, Auxiliary]]:
        return [(1.0, self.auxiliaries[JOINT])]


class Alone(Mode):
    """Each customer's rows through its own auxiliary, fitted to them alone."""

    def delta(self, site: str, x: Tensor, groups: RowGroups | None) -> Tensor | None:
        assert groups is not None, "the taps ask for rows"
        outputs: list[Tensor | None] = []
        parts = groups.split(x)
        for adapter, part in zip(groups.adapters, parts, strict=True):
            auxiliary = self.auxiliaries[self.names[adapter - 1]] if adapter else None
            outputs.append(None if auxiliary is None else _delta(auxiliary, site, part))
        return _joined(outputs, parts, groups)

    def summands(self) -> list[tuple[float, Auxiliary]]:
        if len(self.auxiliaries) > 1:
            raise MergeError(
                f"mode alone has {len(self.auxiliaries)} customers, whose rows need weights of their own; leave them "
                "unmerged, merge one customer at a time, or use mode joint or collaboration"
            )
        return [(1.0, self.auxiliaries[self.names[0]])]


class Collaboration(Mode):
    """Every row through the weighted sum of all customers' auxiliaries; each is fitted to its own customer's rows.

    Args:
        weights: of each customer; unset, their mean.

    Raises:
        GradientLearningError: the weights are not those of the same customers, or not finite.
    """

    def __init__(self, auxiliaries: Mapping[str, Auxiliary], weights: Mapping[str, float] | None = None) -> None:
        super().__init__(auxiliaries)
        given = dict.fromkeys(auxiliaries, 1 / len(auxiliaries)) if weights is None else dict(weights)
        if given.keys() != self.auxiliaries.keys():
            raise GradientLearningError(
                f"weights are for {sorted(given)}, customers are {self.names}; give one for each"
            )
        if not torch.tensor(list(given.values()), dtype=torch.float64).isfinite().all():
            raise GradientLearningError(f"weights are {given}; give finite numbers")
        self.weights = given

    def share(self, owner: str) -> float:
        return self.weights[owner]

    def delta(self, site: str, x: Tensor, groups: RowGroups | None) -> Tensor | None:
        total: Tensor | None = None
        for weight, auxiliary in self.summands():
            found = _delta(auxiliary, site, x)
            if found is not None:
                total = weight * found if total is None else total + weight * found
        return total

    def summands(self) -> list[tuple[float, Auxiliary]]:
        return [(self.weights[name], self.auxiliaries[name]) for name in self.names]


def _delta(auxiliary: Auxiliary, site: str, x: Tensor) -> Tensor | None:
    if site not in auxiliary.sites:
        return None
    parts = {part: tensor.detach() for part, tensor in auxiliary.parts(site).items()}
    return auxiliary.delta(site, x, parts)


def _joined(outputs: Sequence[Tensor | None], parts: Sequence[Tensor], groups: RowGroups) -> Tensor | None:
    """Rows where they were; zeros in those that have nothing."""
    some = next((output for output in outputs if output is not None), None)
    if some is None:
        return None
    return groups.join(
        [
            some.new_zeros(part.shape[0], *some.shape[1:]) if output is None else output.to(some.dtype)
            for output, part in zip(outputs, parts, strict=True)
        ]
    )
