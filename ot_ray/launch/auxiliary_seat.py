"""The place of one auxiliary worker: the actor that fills it now, and all that another would need to take its place.

Which owners sit where is auxiliary_pool.py's affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ot_ray.cola import Taken
from ot_ray.errors import GradientLearningError, LaunchError, OTRayError
from ot_ray.launch.attendance import each, room_for
from ot_ray.launch.auxiliary_worker import AuxiliaryWorker, FitPlan
from ot_ray.launch.auxiliary_workers import AuxiliaryWorkers
from ot_ray.launch.failures import first_line
from ot_ray.launch.shared_tensors import SharedBatch, SharedState, SharedTaken
from ot_ray.training.gradient_parts import Batch


class _Kept(NamedTuple):
    """A batch that may have to be fitted again; its pairs are in the object store."""

    batch: Any
    flush: bool


class _Asked(NamedTuple):
    """A copy of the state that the worker is to make after a batch."""

    number: int
    states: Any


class AuxiliarySeat:
    """Fits batches exactly once, whoever of the workers in this place dies meanwhile.

    A worker's calls run in order. The last snapshot of its state and the batches since are kept here; a new worker
    begins with the one and fits the others again, which gives the same bits, as fits do not depend on time.

    Args:
        name: for messages.
        states: by owner, where the fits begin.
        tell: shows one line: that a worker was replaced, and why.
    """

    def __init__(
        self,
        name: str,
        plans: Mapping[str, FitPlan],
        states: Mapping[str, SharedState],
        workers: AuxiliaryWorkers,
        tell: Callable[[str], None],
    ) -> None:
        self.name, self.owners = name, list(plans)
        self._plans, self._workers, self._tell = dict(plans), workers, tell
        self._states = dict(states)
        self._kept: dict[int, _Kept] = {}
        self._answers: dict[int, Any] = {}
        self._told: dict[int, dict[str, SharedTaken]] = {}
        self._asked: _Asked | None = None
        self._failures = 0
        self._actor, self._ready = self._placed()

    @property
    def kept(self) -> list[int]:
        """Numbers of the batches that are kept."""
        return list(self._kept)

    def wait(self) -> None:
        """Until the worker has started.

        Raises:
            LaunchError: it has not for too long.
        """
        self._get(self._started)

    def submit(self, number: int, batch: Batch, flush: bool) -> None:
        """Hand over a batch."""
        import ray

        self._kept[number] = _Kept(ray.put(SharedBatch.of(batch)), flush)
        self._answers[number] = self._sent(number)
        since = number - (self._asked.number if self._asked else next(iter(self._kept)) - 1)
        if since >= self._workers.snapshot_every:
            # Should an earlier one be under way still, it is waited for, so that what is kept has a bound.
            self._adopt(wait=True)
            self._ask()
        else:
            self._adopt(wait=False)

    def taken(self, number: int) -> dict[str, Taken]:
        """What became of a batch, once it is fitted; asked for once."""
        if number not in self._told and number not in self._answers:
            raise GradientLearningError(f"batch {number} was not submitted, or asked for already")
        told = self._told.pop(number, None)
        if told is None:
            told = self._get(lambda: _fetched(self._answers[number]))
            del self._answers[number]
        return {owner: taken.taken() for owner, taken in told.items()}

    def states(self) -> dict[str, Any]:
        """`Fits.state_dict` by owner, after all that was submitted."""
        while self._kept:
            if self._asked is None:
                self._ask()
            self._adopt(wait=True)
        return {owner: state.state() for owner, state in self._states.items()}

    def load(self, states: Mapping[str, Any]) -> None:
        """Go on from there; batches that were not asked for are forgotten."""
        shared = {owner: SharedState.of(state).owned() for owner, state in states.items()}
        self._kept, self._answers, self._told, self._asked = {}, {}, {}, None
        self._get(lambda: _fetched(self._actor.load.remote(shared)))
        self._states |= shared

    def close(self) -> None:
        """End the worker."""
        import ray

        self._kept, self._answers, self._told, self._asked = {}, {}, {}, None
        if ray.is_initialized():
            ray.kill(self._actor, no_restart=True)

    def _placed(self) -> tuple[Any, Any]:
        """A new worker that begins with the snapshot, and what tells that it has started."""
        import ray

        workers = self._workers
        actor = (
            ray.remote(AuxiliaryWorker)
            .options(
                num_cpus=workers.cpus,
                num_gpus=0,
                resources=workers.resources or None,
                # Not inside the room that a group of training workers has for itself.
                scheduling_strategy="SPREAD",
                # Ray would start it again without the state that it had.
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(self._plans, self._states, max(1, int(workers.cpus)))
        )
        return actor, actor.ready.remote()  # type: ignore[attr-defined]

    def _started(self) -> None:
        import ray

        timeout = self._workers.start_timeout_s
        done, _ = ray.wait([self._ready], timeout=timeout)
        if not done:
            raise LaunchError(f"auxiliary worker {self.name} has not started within {timeout:g} s: {self._missing()}")
        _fetched(self._ready)

    def _missing(self) -> str:
        import ray

        needs = self._workers.needs
        for name, amount in needs.items():
            most = max((node["Resources"].get(name, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
            if most < amount:
                has = f"has more than {most:g}" if most else "of the cluster has any"
                return (
                    f"it needs {amount:g} {name}, and no machine {has}; start machines with it (ray start --resources, "
                    "--num-cpus), or change auxiliary_workers.resources and cpus"
                )
        return (
            f"the cluster has room for {room_for(needs)} more with {each(needs)} each; add machines, lower "
            "auxiliary_workers.count or cpus, or wait longer with auxiliary_workers.start_timeout_s"
        )

    def _sent(self, number: int) -> Any:
        kept = self._kept[number]
        return self._actor.take.remote(number, kept.batch, kept.flush)

    def _ask(self) -> None:
        """For a copy of the state after all that was submitted."""
        if self._kept:
            self._asked = _Asked(list(self._kept)[-1], self._actor.states.remote())

    def _adopt(self, wait: bool) -> None:
        """Take over a snapshot that was asked for, and let go of what is older. It is not there any more afterwards if
        its worker was lost."""
        import ray

        if self._asked is None or not (wait or ray.wait([self._asked.states], timeout=0)[0]):
            return
        number, states = self._asked
        try:
            found: dict[str, SharedState] = _fetched(states)
            # Nobody could tell again what became of a batch that is older than the snapshot.
            told = {n: _fetched(answer) for n, answer in self._answers.items() if n <= number}
        except _lost() as error:
            self._replace(error)
            return
        self._states = {owner: state.owned() for owner, state in found.items()}
        self._told |= told
        self._answers = {n: answer for n, answer in self._answers.items() if n > number}
        self._kept = {n: kept for n, kept in self._kept.items() if n > number}
        self._asked, self._failures = None, 0

    def _get(self, ask: Callable[[], Any]) -> Any:
        """What a call to the worker yields; it is made again if the worker is lost."""
        while True:
            try:
                return ask()
            except _lost() as error:
                self._replace(error)

    def _replace(self, error: BaseException) -> None:
        import ray

        self._failures += 1
        if self._failures > self._workers.max_failures:
            raise LaunchError(
                f"auxiliary worker {self.name} was lost {self._failures} times without coming to its next snapshot: "
                f"{first_line(error)}; see what ends it, or raise auxiliary_workers.max_failures "
                f"({self._workers.max_failures})"
            ) from error
        # It may live, where only the way to it is gone; nobody listens to it any more.
        ray.kill(self._actor, no_restart=True)
        reason, again = first_line(error).partition(". ")[0], len(self._kept)
        self._tell(
            f"auxiliary worker {self.name} was lost ({reason}); another takes its place and fits the last {again} "
            "batches again"
        )
        self._asked = None
        self._actor, self._ready = self._placed()
        sent = {number: self._sent(number) for number in self._kept}
        self._answers = {number: sent[number] for number in self._answers}
        try:
            self._started()
        except _lost() as next_error:
            self._replace(next_error)


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises where a worker is gone, or what it had answered went with its machine."""
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return (RayActorError, ObjectLostError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)


def _fetched(reference: Any) -> Any:
    """A result, or the error of our own tree that was raised there."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, OTRayError):
            raise error.cause from None
        raise
