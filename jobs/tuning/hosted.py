"""A tuning run that others watch: it tells its progress, leaves an adapter an epoch, and its results at the end.

Everything it writes lies under two addresses, `events` and `output`; who reads them is not its concern."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.tuning.claim import Claim
from jobs.tuning.config import TuneConfig
from jobs.tuning.events import Event, EventLog
from jobs.tuning.length import TrainedTokens, epoch_ends
from jobs.tuning.work import Work, save_tuned
from ot_ray.errors import AlreadyExistsError, MissingDependencyError, OTRayError
from ot_ray.store import PatientStore, Store, open_store
from ot_ray.training.tuning import in_types, types_of

RESULT, TABLE, FINAL = "result.json", "result.csv", "adapter"
MOST_FIGURES = 1000
"""Steps of a run, about, whose figures are told."""

# A store that is away is an OSError too; older releases of torch have no error of their own for a device.
_OF_THE_MACHINE = (OSError, MissingDependencyError, getattr(torch, "AcceleratorError", OSError))

_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
_FIGURES = {
    "train_loss": "loss",
    "train_mean_token_accuracy": "token_accuracy",
    "valid_loss": "validation_loss",
    "valid_mean_token_accuracy": "validation_token_accuracy",
}


class HostedRun:
    """The watched side of one run.

    Under `output` it leaves `step-<n>/`, the adapter after each epoch, as that stands; `adapter/`, the last one;
    `result.csv`, a line for each step that was told; and last `result.json`. A run that was stopped and goes on from
    its checkpoints tells nothing twice and leaves what stands. Of two that run at once, as when the first was thought
    dead, the one that started last writes.
    """

    def __init__(self, config: TuneConfig) -> None:
        assert config.events is not None
        patience = config.training.store_patience_s
        events = open_store(config.events)
        self.claim = Claim(events, patience)
        self._output: Store = PatientStore(self.claim.guard(open_store(config.output)), patience)
        self._log = EventLog(PatientStore(self.claim.guard(events), patience))
        self._told: set[tuple[str, int]] | None = None

    def result(self) -> dict[str, Any] | None:
        """What a run that is done left in `result.json`."""
        done = any(key == RESULT for key in self._output.list())
        return json.loads(self._output.read(RESULT)) if done else None

    def begin(self, work: Work, config: TuneConfig) -> None:
        """Say what is tuned.

        Args:
            config: with numbers for steps and batch size.
        """
        self._work, self._config, training = work, config, config.training
        self._ends = epoch_ends(work.rows, training.batch_size, training.steps)
        self._tokens = TrainedTokens(work.data.sequences, training.batch_size, training.seed)
        self._every = -(-training.steps // MOST_FIGURES)
        if self._log.goes_on:
            return
        counts = work.data.counts
        self._say(
            f"Training starts: {work.examples} examples, {counts.tokens} tokens in {work.rows} sequences, "
            f"{training.steps} steps of {training.batch_size} sequences"
        )
        for reason, count in counts.dropped.items():
            self._say(f"{count} examples are left out: {reason}", level="warn")

    def hooks(self, tuned: nn.Module) -> dict[str, Any]:
        """For `Work.fit`, before it starts."""
        self._tuned, self._types = tuned, types_of(tuned)
        return {"milestones": frozenset(self._ends), "record": self._record}

    def finish(self, folder: Path) -> None:
        """Leave the results; `folder` holds the last adapter."""
        training, table = self._config.training, self._log.metrics()
        _publish(self._output, FINAL, folder)
        self._output.write(TABLE, _as_csv(table))
        last = table[-1] if table else {}
        result = {
            "adapter": FINAL,
            "steps": training.steps,
            "tokens": self._tokens.after(training.steps),
            "metrics": {name: last[name] for name in _FIGURES if name in last},
        }
        with contextlib.suppress(AlreadyExistsError):
            self._output.create(RESULT, json.dumps(result).encode())

    def failed(self, error: Exception) -> None:
        """Tell why the run ends, where the reason lies with its data or settings; a store that is away, a device that
        broke, or a package that is not there, is a matter of the machine, and another run may do better."""
        if not isinstance(error, _OF_THE_MACHINE):
            # The error itself says more than one of telling it.
            with contextlib.suppress(OTRayError):
                self._say(_reason(error), level="error")

    def _record(self, figures: Mapping[str, float]) -> None:
        step, training = int(figures["step"]), self._config.training
        if self._told is None:
            self._told = self._log.told_from(step)
            if self._log.goes_on:
                self._say(f"Training goes on after step {step - 1}")
        seen = {name: figures[key] for name, key in _FIGURES.items() if key in figures}
        worth = step == 1 or step % self._every == 0 or step in self._ends or "valid_loss" in seen
        if worth and ("metrics", step) not in self._told:
            self._log.tell(
                "metrics",
                step=step,
                total_steps=training.steps,
                epoch=round(step * training.batch_size / self._work.rows, 6),
                **seen,
                lr=figures["lr"],
                tokens=self._tokens.after(step),
            )
        if step in self._ends:
            self._leave(step, seen)

    def _leave(self, step: int, metrics: dict[str, float]) -> None:
        assert self._told is not None
        name = f"step-{step}"
        if not any(key == f"{name}/manifest.json" for key in self._output.list(name)):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "adapter"
                with in_types(self._types):
                    save_tuned(folder, self._tuned, self._work, self._config, step, metrics.get("valid_loss"))
                _publish(self._output, name, folder)
        if ("checkpoint", step) not in self._told:
            self._log.tell("checkpoint", step=step, folder=name, metrics=metrics)

    def _say(self, text: str, level: str = "info") -> None:
        self._log.tell("message", level=level, message=text)


def _reason(error: Exception) -> str:
    """What the owner of the data reads: nothing of the machine, or of how this is written."""
    if isinstance(error, OTRayError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "The training ran out of memory; use a smaller batch, or shorter examples"
    return f"The training broke off with an unexpected error ({type(error).__name__}); ask the service's operator"


def _publish(store: Store, prefix: str, folder: Path) -> None:
    """Upload a folder, its manifest last and once; nothing is asked of single keys, so that whoever may not list
    the whole store needs no more than its own prefix."""
    manifest = f"{prefix}/manifest.json"
    if manifest in store.list(prefix):
        return
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            store.upload(path, f"{prefix}/{path.name}")
    with contextlib.suppress(AlreadyExistsError):
        store.create(manifest, (folder / "manifest.json").read_bytes())


def _as_csv(table: list[Event]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for event in table:
        writer.writerow(["" if event.get(name) is None else event[name] for name in _COLUMNS.values()])
    return text.getvalue().encode()
