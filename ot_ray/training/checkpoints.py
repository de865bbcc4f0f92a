"""Checkpoints in the store: written by all ranks, visible only once committed, resumed from the latest.

What an engine keeps in its files is its own affair."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ot_ray.errors import AlreadyExistsError, TrainingError
from ot_ray.store import Store
from ot_ray.training.engine import Engine

_COMMIT = re.compile(r"step-(\d{8})/commit\.json")


class Checkpoints:
    """The checkpoints of one run, under `prefix` of a store.

    A checkpoint is ``<prefix>/step-<n>/`` with the engine's files, a small state file per rank, and
    ``commit.json``, written last and once. Whatever has no commit is as good as absent.

    Args:
        fingerprint: what the run is made of (configuration, data digest); a checkpoint of another one is
            refused rather than resumed.
    """

    def __init__(self, store: Store, prefix: str, fingerprint: Mapping[str, Any]) -> None:
        self._store, self._prefix = store, prefix.rstrip("/")
        self._fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True))

    def save(self, engine: Engine, step: int, stream_state: Mapping[str, int], keep: int) -> None:
        """Write a checkpoint after `step` optimiser steps, then remove all but the latest `keep`.

        Called by every rank together.
        """
        place = self._place(step)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            engine.save(folder)
            torch.save(_rank_state(stream_state), folder / f"rank-{engine.rank}.pt")
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    self._store.upload(file, f"{place}/{file.relative_to(folder).as_posix()}")
        engine.barrier()
        if engine.rank == 0:
            commit = {"step": step, "world_size": engine.world_size, "fingerprint": self._fingerprint}
            # A commit that is there already was written by this run before it resumed: the same numbers.
            with contextlib.suppress(AlreadyExistsError):
                self._store.create(f"{place}/commit.json", json.dumps(commit, sort_keys=True).encode())
            for old in self.committed()[:-keep]:
                self._remove(old)
        engine.barrier()

    def committed(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        names = (key[len(self._prefix) + 1 :] for key in self._store.list(self._prefix))
        return sorted(int(match[1]) for name in names if (match := _COMMIT.fullmatch(name)))

    def resume(self, engine: Engine) -> tuple[int, dict[str, int]] | None:
        """Load the latest committed checkpoint into the engine and this rank's random state.

        Returns:
            Steps done and the data position; None where nothing was committed.

        Raises:
            TrainingError: the checkpoint belongs to another configuration or number of workers.
        """
        steps = self.committed()
        if not steps:
            return None
        place = self._place(steps[-1])
        self._check(place, engine)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for key in self._store.list(place):
                target = folder / key[len(place) + 1 :]
                target.parent.mkdir(parents=True, exist_ok=True)
                self._store.download(key, target)
            engine.load(folder)
            state = torch.load(folder / f"rank-{engine.rank}.pt", weights_only=True)
        _restore_random(state)
        return steps[-1], state["stream"]

    def _check(self, place: str, engine: Engine) -> None:
        commit = json.loads(self._store.read(f"{place}/commit.json"))
        if commit["world_size"] != engine.world_size:
            raise TrainingError(
                f"checkpoint {place} was written by {commit['world_size']} workers, this run has "
                f"{engine.world_size}; use as many"
            )
        ours, theirs = self._fingerprint, commit["fingerprint"]
        changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if changed:
            raise TrainingError(
                f"checkpoint {place} belongs to another run: {', '.join(changed)} changed; give the run another "
                "name, or restore what it was started with"
            )

    def _remove(self, step: int) -> None:
        place = self._place(step)
        # The commit goes first, so that a checkpoint half removed is not taken for one.
        self._store.delete(f"{place}/commit.json")
        self._store.delete_prefix(place)

    def _place(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"


def _rank_state(stream_state: Mapping[str, int]) -> dict[str, Any]:
    state: dict[str, Any] = {"stream": dict(stream_state), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
