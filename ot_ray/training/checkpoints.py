"""Checkpoints of a run: copied at once, written in the background, visible only once committed, resumed by ranges.

What the files hold is left to checkpoint_files.py; what an engine keeps, to the engine."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch

from ot_ray.errors import AlreadyExistsError, OTRayError, TrainingError
from ot_ray.store import PatientStore, Store
from ot_ray.training.checkpoint_files import Commit, RankRecord, SavedState, read_record, table_name, write_part
from ot_ray.training.engine import Engine
from ot_ray.training.identity import differences

T = TypeVar("T")

_COMMIT = re.compile(r"step-(\d{8,})/commit\.json")
_STEP = re.compile(r"step-(\d{8,})/([^/]+)")
_FIRST_POLL, _LONGEST_POLL = 0.05, 2.0  # seconds between looks for the other ranks' parts


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int
    """Optimiser steps done."""
    streams: list[dict[str, Any]]
    """The data position of every rank that saved, in order."""
    random: bool
    """Whether this rank's random state is the saved one; another number of ranks has no such state."""


class Checkpoints:
    """The checkpoints of one run, under `prefix` of a store, as one rank sees them.

    A checkpoint is ``<prefix>/step-<n>/<attempt>/rank-<r>.safetensors`` with a table ``rank-<r>.json`` for each
    rank, and ``<prefix>/step-<n>/commit.json``, written last and once, which names the attempt. Whatever has no
    commit is as good as absent.

    Args:
        fingerprint: what the run is made of; a checkpoint of another one is refused rather than resumed.
        keep: how many of the latest checkpoints stay.
        patience_s: seconds that this rank waits for a store that does not answer, and for another rank's part.
    """

    def __init__(
        self, store: Store, prefix: str, fingerprint: Mapping[str, Any], keep: int = 2, patience_s: float = 600
    ) -> None:
        self._store = PatientStore(store, patience_s)
        self._prefix, self._keep, self._patience_s = prefix.rstrip("/"), keep, patience_s
        self._fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True))
        self._writing: threading.Thread | None = None
        self._problem: Exception | None = None
        self._abandoned = threading.Event()
        self.latest: int | None = None
        """Step of the newest checkpoint that this rank knows to be committed; rank 0 knows of all."""

    def save(self, engine: Engine, step: int, stream_state: Mapping[str, Any]) -> None:
        """Copy what training changes, and have it written and committed in the background.

        Every rank calls this together. It first waits for the checkpoint before; training goes on when it returns.

        Raises:
            TrainingError: the checkpoint before could not be written by another rank.
            StoreError, StoreUnavailableError: it could not be written by this one.
        """
        _together(engine, self.wait)
        attempt: str = engine.gather(uuid4().hex)[0]
        place = self._place(step)
        stream, random = json.loads(json.dumps(dict(stream_state))), _random_state()
        pieces = [piece for piece in engine.pieces() if piece.tensor.numel()]

        def write() -> None:
            write_part(self._store, f"{place}/{attempt}", engine.rank, pieces, stream, random)
            if engine.rank == 0:
                self._commit(step, attempt, engine.world_size)

        self._start(write, step)

    def wait(self) -> None:
        """Return once this rank's part of what is under way is written; on rank 0, once it is committed.

        Raises:
            OTRayError: it could not be.
        """
        self._join(None)

    def finish(self, engine: Engine) -> None:
        """Every rank together: return once what is under way is committed.

        Raises:
            OTRayError: it could not be, on this rank or another.
        """
        _together(engine, self.wait)

    def close(self, within_s: float | None = None) -> None:
        """End the background work; what is not done within these seconds (unset: however long) is abandoned.

        Raises:
            OTRayError: what was under way is not written.
        """
        self._join(within_s)

    def committed(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        return sorted(int(match[1]) for name in self._names() if (match := _COMMIT.fullmatch(name)))

    def started(self, engine: Engine) -> bool:
        """Whether anything is committed; every rank together, and only one looks, so that all see the same."""
        return engine.gather(_together(engine, lambda: engine.rank == 0 and bool(self.committed())))[0]

    def resume(self, engine: Engine) -> Resumed | None:
        """Load the latest committed checkpoint into the engine; every rank calls this together.

        Any number of ranks and any engine may have written it; a rank reads the ranges that it holds. The random
        state comes back where there are as many ranks as there were.

        Returns:
            Where to go on; None where nothing was committed.

        Raises:
            TrainingError: the checkpoint belongs to another run or model, or a file of it is missing or damaged.
        """
        # Only one rank looks, so that all go on from the same.
        newest = _together(engine, lambda: self._newest() if engine.rank == 0 else None)
        newest = engine.gather(newest)[0]
        if newest is None:
            return None
        commit = Commit.model_validate(newest)
        place = f"{self._place(commit.step)}/{commit.attempt}"
        records, saved = _together(engine, lambda: self._open(commit, place, engine))
        engine.restore(commit.step, saved.read)
        same = commit.world_size == engine.world_size
        if same:
            _restore_random(records[engine.rank].random)
        self.latest = commit.step
        return Resumed(commit.step, [record.stream for record in records], same)

    def _start(self, work: Callable[[], None], step: int) -> None:
        def run() -> None:
            try:
                work()
            except OTRayError as error:
                self._problem = error
            except Exception as error:
                problem = TrainingError(
                    f"the checkpoint of step {step} could not be written: {error!r}; check the disk"
                )
                problem.__cause__ = error
                self._problem = problem

        self._writing = threading.Thread(target=run, name=f"checkpoint-{step}", daemon=True)
        self._writing.start()

    def _join(self, within_s: float | None) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.join(within_s)
            if writing.is_alive():
                self._abandoned.set()
                self._store.abandon()
                writing.join(within_s)
            if writing.is_alive():
                raise TrainingError(f"{writing.name} is still being written and was given up; look at the store")
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _commit(self, step: int, attempt: str, world_size: int) -> None:
        place = self._place(step)
        self._await_parts(f"{place}/{attempt}", world_size)
        commit = Commit(step=step, attempt=attempt, world_size=world_size, fingerprint=self._fingerprint)
        try:
            self._store.create(f"{place}/commit.json", commit.model_dump_json().encode())
        except AlreadyExistsError:
            # Workers of this run that were thought dead got there first, with the same numbers.
            attempt = read_record(self._store, f"{place}/commit.json", Commit).attempt
        self.latest = step
        self._prune(step, attempt)

    def _await_parts(self, place: str, world_size: int) -> None:
        missing, delay = {table_name(rank) for rank in range(world_size)}, _FIRST_POLL
        heard_at = time.monotonic()
        while missing:
            left = missing - {key.rpartition("/")[2] for key in self._store.list(place)}
            if left < missing:
                missing, heard_at = left, time.monotonic()
                continue
            if time.monotonic() - heard_at >= self._patience_s or self._abandoned.wait(delay):
                raise TrainingError(
                    f"checkpoint {place} is not committed: {', '.join(sorted(missing))} did not come within "
                    f"{time.monotonic() - heard_at:.0f} s; see what the other workers say"
                )
            delay = min(1.5 * delay, _LONGEST_POLL)

    def _prune(self, newest: int, attempt: str) -> None:
        """Remove checkpoints beyond `keep`, and attempts up to the newest checkpoint that came to nothing."""
        kept = [step for step in self.committed() if step <= newest][-self._keep :]
        present = {(int(match[1]), match[2]) for name in self._names() if (match := _STEP.match(name))}
        for step in sorted({step for step, _ in present if step < newest} - set(kept)):
            place = self._place(step)
            # The commit goes first, so that a checkpoint half removed is not taken for one.
            self._store.delete(f"{place}/commit.json")
            self._store.delete_prefix(place)
        for step, name in present:
            if step == newest and name not in (attempt, "commit.json"):
                self._store.delete_prefix(f"{self._place(step)}/{name}")

    def _newest(self) -> dict[str, Any] | None:
        steps = self.committed()
        if not steps:
            return None
        place = self._place(steps[-1])
        commit: Commit = read_record(self._store, f"{place}/commit.json", Commit)
        changed = differences(self._fingerprint, commit.fingerprint)
        if changed:
            raise TrainingError(
                f"checkpoint {place} belongs to another run: {', '.join(changed)} changed; give the run another "
                "name, or restore what it was started with"
            )
        return commit.model_dump(mode="json")

    def _open(self, commit: Commit, place: str, engine: Engine) -> tuple[Sequence[RankRecord], SavedState]:
        records = [
            read_record(self._store, f"{place}/{table_name(rank)}", RankRecord) for rank in range(commit.world_size)
        ]
        saved = SavedState(self._store, place, records)
        saved.check_names(engine.sizes())
        if engine.rank == 0:
            saved.check_files()
        return records, saved

    def _names(self) -> list[str]:
        return [key[len(self._prefix) + 1 :] for key in self._store.list(self._prefix)]

    def _place(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"


def _together(engine: Engine, work: Callable[[], T]) -> T:
    """Do this rank's work; where it fails on one rank it fails on all, so that none waits for another."""
    answer, problem = None, None
    try:
        answer = work()
    except Exception as error:
        problem = error
    told = engine.gather(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    for rank, text in enumerate(told):
        if text is not None:
            raise TrainingError(f"rank {rank}: {text}")
    return cast(T, answer)


def _random_state() -> dict[str, str]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {device: bytes(tensor.tolist()).hex() for device, tensor in state.items()}


def _restore_random(state: Mapping[str, str]) -> None:
    tensors = {device: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for device, text in state.items()}
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
