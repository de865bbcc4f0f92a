"""The loop of gradient learning: passes of the frozen base, fits of the auxiliaries, and how far the two may be apart.

Where fits are made is gradient_fitting.py's, whose rows come when gradient_batches.py's."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from ot_ray.cola import BasePass, CustomerRows, Merging, Mode, Passed, Taken
from ot_ray.config import Config
from ot_ray.errors import GradientLearningError, MergeError, NotFiniteError, TrainingError
from ot_ray.training.gradient_checkpoints import GradientCheckpoints, GradientState
from ot_ray.training.gradient_fitting import Fitting
from ot_ray.training.loop import Evaluate, Report, TrainingResult


class GradientRun(Config):
    """How far a run of gradient learning goes, and when it stops to look."""

    steps: int = Field(ge=1)
    """Passes of the base model."""
    rows: int = Field(default=2, ge=1)
    """Sequences of each customer in a pass."""
    seed: int = Field(default=0, ge=0)
    """Of the order of each customer's sequences."""
    staleness: int = Field(default=0, ge=0)
    """Batches whose fits a pass does without, so that they are made while it runs; 0 is the exact algorithm."""
    merged: bool = False
    """Passes run on weights that hold the auxiliaries; for modes whose rows all need the same weights, and no mlp."""
    flush_every: int = Field(default=0, ge=0)
    """Passes after which what an interval has left is fitted, as at the end of an epoch; 0: after the last only."""
    evaluate_every: int = Field(default=0, ge=0)
    """Passes between evaluations; 0 evaluates before the first and after the last only."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Passes between checkpoints; 0 takes one after the last only."""

    def flushes(self, step: int) -> bool:
        """Whether what is left is fitted after `step` passes."""
        return step == self.steps or _due(step, self.flush_every)


def learn(
    base: BasePass,
    mode: Mode,
    batches: RowsByNumber,
    fitting: Fitting,
    run: GradientRun,
    *,
    merging: Merging | None = None,
    checkpoints: GradientCheckpoints | None = None,
    evaluate: Evaluate | None = None,
    report: Report | None = None,
) -> TrainingResult:
    """Run `run.steps` passes, from the latest checkpoint if there is one.

    Pass n goes through auxiliaries to which the fits of the batches up to n - 1 - `staleness` are applied, and no
    others, however fast the fits are made, so that a run can be repeated. An evaluation, a checkpoint and the end
    wait for all fits, and the pass after them sees them all.

    Args:
        mode: its auxiliaries are the server's; they take over what `fitting` says, from its present state on.
        batches: the rows of a batch by its number, whenever it is asked for; a list does.
        merging: keeps the clean weights while `run.merged`; unset, there is one for this run, and the weights are the
            clean ones again afterwards.
        evaluate: figures of the auxiliaries in `mode`; called before the first pass, too.
        report: called after each pass with its figures.

    Returns:
        All steps' figures, those before a resume included: `step`, `loss` (mean over customers), `loss/<customer>`,
        `tokens_per_s`, `seconds` of the whole step, `fit_wait` of these that the next pass waited for (the batch handed
        over, fits waited for and applied), `fit_wait_share`, and what became of the batches so far that are applied:
        `fits`, of all owners, and `refused`. Figures of an evaluation are those of the step it follows, and stand in
        `evaluations`.

    Raises:
        MergeError: `run.merged` in a mode or kind that weights cannot hold.
        TrainingError: the checkpoint is another run's; an auxiliary became infinite.
    """
    with _merged(base, mode, run, merging) as merge:
        progress = _Progress.start(base, mode, fitting, run, checkpoints, merge)
        if evaluate is not None and progress.step == 0:
            progress.evaluate(evaluate)
        while progress.step < run.steps:
            figures = progress.advance(batches[progress.step])
            step, last = progress.step, progress.step == run.steps
            evaluated = evaluate is not None and (last or _due(step, run.evaluate_every))
            saved = checkpoints is not None and (last or _due(step, run.checkpoint_every))
            if evaluated or saved or last:
                progress.settle()
            if evaluate is not None and evaluated:
                progress.evaluate(evaluate)
            if checkpoints is not None and saved:
                checkpoints.save(progress.state())
            if report is not None:
                report(figures)
    return TrainingResult(progress.history, progress.evaluations)


class RowsByNumber(Protocol):
    """The rows of a batch by its number: the same for the same number."""

    def __getitem__(self, number: int, /) -> CustomerRows: ...


Merge = Callable[[], None]


@contextmanager
def _merged(base: BasePass, mode: Mode, run: GradientRun, merging: Merging | None) -> Iterator[Merge]:
    """What makes the weights hold the mode's auxiliaries, where passes run merged."""
    if not run.merged:
        if merging is not None:
            raise MergeError("merging is given, but run.merged is false; set run.merged=true, or leave merging out")
        yield lambda: None
        return
    mode.summands()
    own: contextlib.AbstractContextManager[Merging]
    if merging is None:
        used = {name for auxiliary in mode.auxiliaries.values() for name in auxiliary.sites}
        own = Merging(base.model, {name: site for name, site in base.sites.items() if name in used})
    else:
        own = contextlib.nullcontext(merging)
    with own as held:
        yield lambda: held.merge(mode.summands())


@dataclass
class _Progress:
    """A run as far as it is: what was passed, what was fitted, and what of that the mode's auxiliaries hold."""

    base: BasePass
    mode: Mode
    fitting: Fitting
    run: GradientRun
    merge: Merge
    history: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    step: int
    fits: dict[str, int]
    refused: int
    waiting: deque[int]

    @classmethod
    def start(
        cls,
        base: BasePass,
        mode: Mode,
        fitting: Fitting,
        run: GradientRun,
        checkpoints: GradientCheckpoints | None,
        merge: Merge,
    ) -> _Progress:
        """At the beginning, or where the latest checkpoint is."""
        saved = checkpoints.resume() if checkpoints is not None else None
        if saved is not None:
            fitting.load(saved.fits)
        states = fitting.states() if saved is None else saved.fits
        done = 0 if saved is None else saved.step
        _require_owners(mode, states, done)
        for owner, auxiliary in mode.auxiliaries.items():
            auxiliary.load(states[owner]["fitter"]["auxiliary"])
        merge()
        fits = {owner: int(states[owner]["fitter"]["steps"]) for owner in mode.names}
        if saved is None:
            return cls(base, mode, fitting, run, merge, [], [], 0, fits, 0, deque())
        return cls(
            base, mode, fitting, run, merge, saved.history, saved.evaluations, done, fits, saved.refused, deque()
        )

    def advance(self, rows: CustomerRows) -> dict[str, float]:
        """One pass, its batch handed over, and the wait for what the next pass goes through."""
        begun = time.perf_counter()
        passed = self.base(rows, self.mode, self.run.merged)
        yielded = time.perf_counter()
        number, self.step = self.step, self.step + 1
        pairs = {owner: passed.pairs.get(owner) for owner in self.mode.names}
        self.fitting.submit(number, pairs, self.run.flushes(self.step))
        self.waiting.append(number)
        self._apply(self.run.staleness)
        ended = time.perf_counter()
        figures = {
            "step": float(self.step),
            **_losses(passed),
            "tokens_per_s": _tokens(rows) / (ended - begun),
            "seconds": ended - begun,
            "fit_wait": ended - yielded,
            "fit_wait_share": (ended - yielded) / (ended - begun),
            "fits": float(sum(self.fits.values())),
            "refused": float(self.refused),
        }
        self.history.append(figures)
        return figures

    def settle(self) -> None:
        """Wait for all fits, and apply them."""
        self._apply(0)
        if self.history:
            self.history[-1] |= {"fits": float(sum(self.fits.values())), "refused": float(self.refused)}

    def evaluate(self, evaluate: Evaluate) -> None:
        """Look at the auxiliaries, all fits applied."""
        seen = dict(evaluate())
        self.evaluations.append({"step": float(self.step), **seen})
        if self.history:
            self.history[-1] |= seen

    def state(self) -> GradientState:
        """What a run goes on from."""
        return GradientState(self.step, self.fitting.states(), self.refused, self.history, self.evaluations)

    def _apply(self, left: int) -> None:
        """Take over the fits of all batches but the last `left`."""
        changed = False
        while len(self.waiting) > left:
            for owner, taken in self.fitting.taken(self.waiting.popleft()).items():
                self.fits[owner] = taken.steps
                self.refused += taken.refused is not None
                if taken.tensors is not None:
                    self._load(owner, taken)
                    changed = True
        if changed:
            self.merge()

    def _load(self, owner: str, taken: Taken) -> None:
        assert taken.tensors is not None
        try:
            self.mode.auxiliaries[owner].load(taken.tensors)
        except NotFiniteError as error:
            raise TrainingError(
                f"the auxiliary of {owner} became infinite at fit {taken.steps} ({error}); lower its learning rate"
            ) from None


def _require_owners(mode: Mode, states: Mapping[str, Any], done: int) -> None:
    if sorted(states) != mode.names:
        raise GradientLearningError(
            f"fits are of {', '.join(sorted(states))}, the mode's auxiliaries of {', '.join(mode.names)}; give both "
            "the same"
        )
    for owner, state in states.items():
        if state["next"] != done:
            raise GradientLearningError(
                f"the fits of {owner} have taken {state['next']} batches, this run {done}; begin with new fits"
            )


def _losses(passed: Passed) -> dict[str, float]:
    mean = sum(passed.losses.values()) / max(1, len(passed.losses))
    return {"loss": mean, **{f"loss/{name}": loss for name, loss in sorted(passed.losses.items())}}


def _tokens(rows: CustomerRows) -> int:
    return rows.input_ids.numel() if rows.mask is None else int(rows.mask.sum())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
