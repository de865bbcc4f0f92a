"""Checkpoints of a run of gradient learning: fitters' states and figures, there only once committed.

Nothing in them has to be unpickled: safetensors and JSON. When one is taken is the loop's affair."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ot_ray.cola import pack_state, unpack_state
from ot_ray.config import Config
from ot_ray.errors import GradientLearningError, StoreError, StoreUnavailableError, TrainingError
from ot_ray.store import PatientStore, Store
from ot_ray.store.partial import chunks_of
from ot_ray.training.checkpoint_files import damaged, read_record
from ot_ray.training.identity import differences

_COMMIT = re.compile(r"step-(\d{8,})/commit\.json")
_FIGURES = re.compile(r"figures/step-(\d{8,})\.json")

Figures = dict[str, float]


@dataclass
class GradientState:
    """All that the next pass depends on, and the figures so far."""

    step: int
    """Passes done, whose fits are all made."""
    fits: dict[str, Any]
    """`Fits.state_dict` by owner."""
    refused: int = 0
    """Batches that were left out so far, over all owners."""
    history: list[Figures] = field(default_factory=list)
    """The figures of every pass."""
    evaluations: list[Figures] = field(default_factory=list)
    """The figures of every evaluation, with the step that it followed."""


class _Commit(Config):
    """The last write of a checkpoint; without it there is none."""

    step: int = Field(ge=1)
    """Passes done."""
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Names the file of states; a step that is tried again gets another."""
    sha256: str
    """Of that file, in hexadecimal."""
    refused: int = Field(ge=0)
    """As in `GradientState`."""
    fingerprint: dict[str, Any]
    """What the run is made of."""


class GradientCheckpoints:
    """The checkpoints of one run, under `prefix` of a store; one process writes them.

    A checkpoint is ``<prefix>/step-<n>/<attempt>.safetensors`` and ``<prefix>/step-<n>/commit.json``, written last;
    what has no commit is as good as absent. ``<prefix>/figures/step-<n>.json`` holds the figures since the checkpoint
    before, and stays.

    Args:
        fingerprint: what the run is made of; a checkpoint of another one is refused rather than resumed.
        keep: how many of the latest checkpoints stay.
        patience_s: seconds to wait for a store that does not answer.
    """

    def __init__(
        self, store: Store, prefix: str, fingerprint: Mapping[str, Any], keep: int = 2, patience_s: float = 600
    ) -> None:
        self._store, self._prefix, self._keep = PatientStore(store, patience_s), prefix.rstrip("/"), keep
        self._fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True))
        self._steps, self._evaluations = 0, 0

    def save(self, state: GradientState) -> None:
        """Write a checkpoint and commit it.

        Raises:
            StoreError, StoreUnavailableError: it could not be written; the one before stays.
        """
        attempt, place = uuid4().hex, self._place(state.step)
        told = {"history": state.history[self._steps :], "evaluations": state.evaluations[self._evaluations :]}
        self._store.write(self._figures(state.step), json.dumps(told).encode())
        tensors, text = pack_state(state.fits)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            save_file(tensors, path, metadata={"state": text})
            self._store.upload(path, f"{place}/{attempt}.safetensors")
            sha256 = _sha256(path)
        commit = _Commit(
            step=state.step, attempt=attempt, sha256=sha256, refused=state.refused, fingerprint=self._fingerprint
        )
        self._store.write(f"{place}/commit.json", commit.model_dump_json().encode())
        self._steps, self._evaluations = len(state.history), len(state.evaluations)
        self._prune(attempt)

    def committed(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        return [step for step, _ in self._found(_COMMIT)]

    def resume(self) -> GradientState | None:
        """The latest committed checkpoint; None where nothing was committed.

        Raises:
            TrainingError: it belongs to another run, or a file of it is missing or damaged.
        """
        steps = self.committed()
        if not steps:
            return None
        place = self._place(steps[-1])
        commit = read_record(self._store, f"{place}/commit.json", _Commit)
        if changed := differences(self._fingerprint, commit.fingerprint):
            raise TrainingError(
                f"checkpoint {place} belongs to another run: {', '.join(changed)} changed; give the run another folder "
                "of checkpoints, or restore what it was started with"
            )
        state = GradientState(commit.step, self._read(place, commit), commit.refused)
        for step, key in self._found(_FIGURES):
            if step > commit.step:
                # Of a checkpoint that was given up; its steps are done again.
                self._store.delete(key)
                continue
            told = json.loads(self._store.read(key))
            state.history += told["history"]
            state.evaluations += told["evaluations"]
        self._steps, self._evaluations = len(state.history), len(state.evaluations)
        return state

    def _read(self, place: str, commit: _Commit) -> dict[str, Any]:
        key = f"{place}/{commit.attempt}.safetensors"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            try:
                self._store.download(key, path, commit.sha256)
                with safe_open(path, "pt") as file:
                    text = (file.metadata() or {})["state"]
                return unpack_state(load_file(path), text)
            except StoreUnavailableError:
                raise
            except (StoreError, SafetensorError, KeyError, GradientLearningError) as error:
                raise damaged(key, str(error)) from error

    def _prune(self, attempt: str) -> None:
        steps = self.committed()
        newest = self._place(steps[-1])
        for step in steps[: -self._keep]:
            # The commit goes first, so that a checkpoint half removed is not taken for one.
            self._store.delete(f"{self._place(step)}/commit.json")
            self._store.delete_prefix(self._place(step))
        for key in list(self._store.list(newest)):
            if key not in (f"{newest}/commit.json", f"{newest}/{attempt}.safetensors"):
                self._store.delete(key)

    def _found(self, pattern: re.Pattern[str]) -> list[tuple[int, str]]:
        keys = list(self._store.list(self._prefix))
        matches = [(pattern.fullmatch(key[len(self._prefix) + 1 :]), key) for key in keys]
        return sorted((int(match[1]), key) for match, key in matches if match)

    def _place(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"

    def _figures(self, step: int) -> str:
        return f"{self._prefix}/figures/step-{step:08d}.json"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in chunks_of(path):
        digest.update(chunk)
    return digest.hexdigest()
