"""Nights on the small scene, with a stand-in for the distillation: it leaves what a run leaves, without Ray."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jobs.emulator import night
from jobs.emulator.config import MakeEmulatorConfig
from ot_ray.model import emulate
from ot_ray.store import LocalStore, ObjectInfo, open_store
from tests.fixtures.models import tiny_model
from tests.jobs.scene import DEPTH, KEPT, PLAN

LAYERS = "model.decoder.layers."


def night_config(place: Path, **changes: Any) -> MakeEmulatorConfig:
    values: dict[str, Any] = {
        "model": {"name": "tiny", "source": str(place / "full")},
        "data": {"source": str(place / "train.jsonl"), "workers": 0},
        "validation": {"source": str(place / "train.jsonl"), "limit": 8},
        "split": PLAN,
        "sequence_length": 16,
        "training": {"steps": 3, "batch_size": 2, "lr": 1e-3},
        "workers": {"count": 2},
        "store": str(place / "owner"),
        "bundles": str(place / "bundles"),
        "private_key": str(place / "keys/private.pem"),
    }
    return MakeEmulatorConfig.model_validate({**values, **changes})


class Distilling:
    """Leaves an emulator whose weights follow from the run, and counts how often it was asked."""

    def __init__(self, full: float = 10.0, emulated: float = 20.0) -> None:
        self.runs: list[str] = []
        self.perplexity = {"full": full, "dropped": 40.0, "emulated": emulated}

    def __call__(self, payload: dict[str, Any], run: str) -> dict[str, Any]:
        assert payload["distill"]["run"] == run
        self.runs.append(run)
        store = open_store(payload["distill"]["store"])
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, "emulator.safetensors")
            save_file(emulator_state(), path)
            store.upload(path, f"runs/{run}/emulator.safetensors")
        steps = payload["distill"]["training"]["steps"]
        history = [
            {"step": step, "loss": 1.0, "lm_loss": 1.0, "kd_loss": 0.1, "lr": 1e-3, "seconds": 1.0, "data_wait": 0.0}
            for step in range(1, steps + 1)
        ]
        store.write(f"runs/{run}/history.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
        measured = payload["distill"]["validation"] is not None
        return {
            "steps": steps,
            "first": history[0],
            "last": history[-1],
            "data_digest": payload["distill"]["data_digest"],
            "perplexity": dict(self.perplexity) if measured else {},
        }


def emulator_state() -> dict[str, torch.Tensor]:
    """Weights of E that are not those of the layers it started from."""
    state = emulate(tiny_model("opt", DEPTH), PLAN, KEPT).state_dict()
    found = {}
    for name, tensor in state.items():
        place, _, rest = name.removeprefix(LAYERS).partition(".")
        if name.startswith(LAYERS) and PLAN.bottom <= int(place) < PLAN.bottom + PLAN.keep:
            found[f"{int(place) - PLAN.bottom}.{rest}"] = tensor + 0.01
    return found


class Killed(BaseException):
    """The process was killed: nothing that it does after this reaches a store."""


class Mortal:
    """Kills the job at one of its writes, counted over all stores; None lets it live and lists the writes."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.writes = last, list[str]()

    def write(self, key: str) -> None:
        if key.endswith("/beat.json"):
            return
        if self.last is not None and len(self.writes) >= self.last:
            raise Killed(key)
        self.writes.append(key)

    def open(self, url: str) -> LocalStore:
        return _MortalStore(url, self)


class _MortalStore(LocalStore):
    def __init__(self, root: str, mortal: Mortal) -> None:
        super().__init__(root)
        self._mortal = mortal

    def write(self, key: str, data: bytes) -> None:
        self._mortal.write(key)
        super().write(key, data)

    def create(self, key: str, data: bytes) -> None:
        self._mortal.write(key)
        super().create(key, data)

    def upload(self, path: str | Path, key: str, progress: Callable[[int], None] | None = None) -> ObjectInfo:
        self._mortal.write(key)
        return super().upload(path, key, progress)

    def delete_prefix(self, prefix: str) -> None:
        self._mortal.write(prefix)
        super().delete_prefix(prefix)


def run_mortal(config: MakeEmulatorConfig, distil: Distilling, mortal: Mortal) -> dict[str, Any] | None:
    """One night; None if it was killed. The lease of a killed one is cleared, as if its time had passed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(night, "open_store", mortal.open)
        try:
            return night.run_night(config, distil)
        except Killed:
            LocalStore(config.store).delete_prefix("leases")
            return None


def kept_files(place: Path) -> set[str]:
    """What lies in both stores, but for leases."""
    return {
        f"{name}/{key}"
        for name in ("owner", "bundles")
        for key in LocalStore(place / name).list()
        if not key.startswith("leases/")
    }
