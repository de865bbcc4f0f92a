"""What an auxiliary worker does, wherever it runs: it fits some owners' auxiliaries to batches that come as arrays.

That it is an actor on another machine, and what happens when it dies, is auxiliary_pool.py's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ot_ray.cola import Auxiliary, AuxiliaryConfig, FitConfig, Fits, Site, make_fitter
from ot_ray.launch.shared_tensors import SharedBatch, SharedState, SharedTaken
from ot_ray.training.gradient_fitting import take_or_leave_out


@dataclass(frozen=True)
class FitPlan:
    """What a fitter of one owner is made of, but for its tensors."""

    sites: dict[str, Site]
    auxiliary: AuxiliaryConfig
    dtype: str
    """Of the tensors, such as `float32`."""
    fitting: FitConfig

    @classmethod
    def of(cls, auxiliary: Auxiliary, fitting: FitConfig) -> FitPlan:
        """The plan for a twin of an auxiliary."""
        dtype = next(iter(auxiliary.tensors.values())).dtype
        return cls(auxiliary.sites, auxiliary.config, str(dtype).removeprefix("torch."), fitting)


class AuxiliaryWorker:
    """The fitters of some owners on CPUs of this machine.

    Args:
        states: by owner, where it begins.
        threads: that a fit may use.
    """

    def __init__(self, plans: Mapping[str, FitPlan], states: Mapping[str, SharedState], threads: int) -> None:
        torch.set_num_threads(threads)
        self._fits = Fits(
            {
                owner: make_fitter(
                    Auxiliary(plan.sites, plan.auxiliary, dtype=getattr(torch, plan.dtype)), plan.fitting
                )
                for owner, plan in plans.items()
            }
        )
        self.load(states)

    def ready(self) -> bool:
        """It has begun."""
        return True

    def take(self, number: int, batch: SharedBatch, flush: bool) -> dict[str, SharedTaken]:
        """What becomes of a batch, by owner; see `take_or_leave_out`."""
        return {
            owner: SharedTaken.of(take_or_leave_out(self._fits, owner, number, pairs, flush))
            for owner, pairs in batch.pairs().items()
        }

    def states(self) -> dict[str, SharedState]:
        """Where each owner's fitter is."""
        return {owner: SharedState.of(self._fits.state_dict(owner)) for owner in self._fits.customers}

    def load(self, states: Mapping[str, SharedState]) -> None:
        """Go on from there."""
        for owner, state in states.items():
            self._fits.load_state_dict(owner, state.state())
