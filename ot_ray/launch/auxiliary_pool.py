"""Auxiliaries fitted by actors on CPU machines, while the base model is at its next pass: a `Fitting` of the training
loop.

How one worker is kept and replaced is auxiliary_seat.py's, what it does auxiliary_worker.py's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ot_ray.cola import Auxiliary, FitConfig, Fits, Pair, Taken, make_fitter
from ot_ray.errors import GradientLearningError, LaunchError
from ot_ray.launch.attendance import tell_on_stderr
from ot_ray.launch.auxiliary_seat import AuxiliarySeat
from ot_ray.launch.auxiliary_worker import FitPlan
from ot_ray.launch.auxiliary_workers import AuxiliaryWorkers
from ot_ray.launch.shared_tensors import SharedState
from ot_ray.training.gradient_fitting import Fitting


class AuxiliaryPool(Fitting):
    """The fitters of all owners, dealt out to workers of the Ray cluster that this process is connected to.

    A batch goes into the object store once and is fitted exactly once: where a worker or its machine is lost, another
    goes on from a copy of its state, and the result is the same to the last bit.

    Args:
        auxiliaries: by owner, where the fits begin; they are left as they are.
        fitting: of all, or of each.
        tell: shows one line: that a worker was replaced, and why.

    Raises:
        LaunchError: this process belongs to no cluster, or the workers have not started for too long; the message says
            what the cluster lacks.
        GradientLearningError: `fitting` is not of the same owners.
    """

    def __init__(
        self,
        auxiliaries: Mapping[str, Auxiliary],
        fitting: FitConfig | Mapping[str, FitConfig],
        workers: AuxiliaryWorkers | None = None,
        tell: Callable[[str], None] = tell_on_stderr,
    ) -> None:
        import ray

        if not ray.is_initialized():
            raise LaunchError("this process belongs to no Ray cluster; connect to one first, with ray_cluster()")
        workers = workers or AuxiliaryWorkers()
        plans = {owner: FitPlan.of(auxiliaries[owner], own) for owner, own in _each(auxiliaries, fitting).items()}
        start = Fits({owner: make_fitter(auxiliaries[owner].copy(), plan.fitting) for owner, plan in plans.items()})
        self._seats: list[AuxiliarySeat] = []
        try:
            for place, owners in enumerate(_dealt(auxiliaries, workers.count)):
                states = {owner: SharedState.of(start.state_dict(owner)) for owner in owners}
                own = {owner: plans[owner] for owner in owners}
                self._seats.append(AuxiliarySeat(str(place), own, states, workers, tell))
            for seat in self._seats:
                seat.wait()
        except BaseException:
            self.close()
            raise
        seat_of = {owner: seat for seat in self._seats for owner in seat.owners}
        self._seat_of = {owner: seat_of[owner] for owner in auxiliaries}

    def __enter__(self) -> AuxiliaryPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def kept(self) -> list[list[int]]:
        """By worker, the numbers of the batches that are kept in case it is lost."""
        return [seat.kept for seat in self._seats]

    def submit(self, number: int, pairs: Mapping[str, Mapping[str, Pair] | None], flush: bool = False) -> None:
        self._require(pairs)
        for seat in self._seats:
            seat.submit(number, {owner: pairs[owner] for owner in seat.owners if owner in pairs}, flush)

    def taken(self, number: int) -> dict[str, Taken]:
        return self._in_order({owner: taken for seat in self._seats for owner, taken in seat.taken(number).items()})

    def states(self) -> dict[str, Any]:
        return self._in_order({owner: state for seat in self._seats for owner, state in seat.states().items()})

    def load(self, states: Mapping[str, Any]) -> None:
        self._require(states)
        for seat in self._seats:
            seat.load({owner: states[owner] for owner in seat.owners if owner in states})

    def close(self) -> None:
        for seat in self._seats:
            seat.close()
        self._seats = []

    def _in_order(self, found: dict[str, Any]) -> dict[str, Any]:
        return {owner: found[owner] for owner in self._seat_of if owner in found}

    def _require(self, owners: Mapping[str, Any]) -> None:
        if unknown := sorted(owners.keys() - self._seat_of.keys()):
            raise GradientLearningError(f"{unknown[0]!r} is not fitted here; {', '.join(self._seat_of)} are")


def _each(auxiliaries: Mapping[str, Auxiliary], fitting: FitConfig | Mapping[str, FitConfig]) -> dict[str, FitConfig]:
    if isinstance(fitting, FitConfig):
        fitting = dict.fromkeys(auxiliaries, fitting)
    if fitting.keys() != auxiliaries.keys() or not auxiliaries:
        raise GradientLearningError(
            f"fitting is of {sorted(fitting)}, auxiliaries are of {sorted(auxiliaries)}; give both of the same owners"
        )
    return dict(fitting)


def _dealt(auxiliaries: Mapping[str, Auxiliary], count: int) -> list[list[str]]:
    """Owners by worker: the largest first, each to whoever has least."""
    sizes = {owner: sum(t.numel() for t in auxiliary.tensors.values()) for owner, auxiliary in auxiliaries.items()}
    dealt: list[list[str]] = [[] for _ in range(min(count, len(sizes)))]
    loads = [0] * len(dealt)
    for owner in sorted(sizes, key=lambda owner: (-sizes[owner], owner)):
        least = loads.index(min(loads))
        dealt[least].append(owner)
        loads[least] += sizes[owner]
    return dealt
