"""Auxiliaries and their fitters in memory, as the store has them; those used last stay.

Which state counts is the catalogue's word: what is here is only ever the state under a key that it named."""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ot_ray.cola import Auxiliary, Fitter, make_fitter, pack_state, unpack_state
from ot_ray.store import Store
from serve.catalogue.records import GradientAuxiliary
from serve.gradients.plans import SessionPlan

# An optimiser's averages and the gradients of an interval, beside the tensors.
_WITH_FITTER = 4


@dataclass
class Resident:
    """An auxiliary at one version."""

    id: str
    auxiliary: Auxiliary
    version: int
    key: str | None
    fitter: Fitter | None = None
    """Where the server fits it."""
    older: list[str] = field(default_factory=list)
    """Keys of versions before this one, the oldest first."""

    @property
    def bytes(self) -> int:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.auxiliary.tensors.values())
        return size if self.fitter is None else size * _WITH_FITTER


class Residents:
    """The auxiliaries that are in memory.

    Args:
        device: of the tensors.
        most_bytes: that stay, beside those that are just used.
    """

    def __init__(self, store: Store, device: torch.device | str, most_bytes: int) -> None:
        self._store, self._device, self._most = store, device, most_bytes
        self._here: OrderedDict[str, Resident] = OrderedDict()

    def get(self, plan: SessionPlan, row: GradientAuxiliary) -> Resident:
        """The auxiliary of a session as its row says, from memory where that has it.

        Raises:
            NotFoundError: the store does not have it, any more perhaps.
            StoreError: the store does not answer.
            GradientLearningError: its file is not of this session's kind and sites.
        """
        found = self._here.get(row.id)
        if found is None or (found.version, found.key) != (row.version, row.key):
            self.forget(row.id)
            found = self._load(plan, row)
        elif plan.fit == "server" and found.fitter is None:
            found.fitter = make_fitter(found.auxiliary, plan.fitting)
        self._here[row.id] = found
        self._here.move_to_end(row.id)
        return found

    def forget(self, auxiliary_id: str) -> None:
        """Let go of one, whose state here may be none of the store's."""
        self._here.pop(auxiliary_id, None)

    def trim(self) -> None:
        """Let go of those that were not used for longest, until the rest is small enough."""
        size = sum(resident.bytes for resident in self._here.values())
        while self._here and size > self._most:
            size -= self._here.popitem(last=False)[1].bytes

    def write(self, resident: Resident, key: str) -> None:
        """Put the state that is here under a key, the fitter's first.

        Raises:
            StoreError: the store does not take it.
        """
        has_fitter = resident.fitter is not None
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in resident.auxiliary.tensors.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            if resident.fitter is not None:
                packed, text = pack_state(resident.fitter.state_dict())
                packed = {name: tensor.cpu().clone() for name, tensor in packed.items()}
                save_file(packed, path, {"state": text})
                self._store.upload(path, fitter_key(key))
            save_file(tensors, path, {"fitter": json.dumps(has_fitter)})
            self._store.upload(path, key)

    def moved(self, resident: Resident, version: int, key: str) -> None:
        """Note that what is here is now the catalogue's state. The one before stays in the store for whoever still
        reads it; older ones go."""
        if resident.key is not None:
            resident.older.append(resident.key)
        resident.version, resident.key = version, key
        while len(resident.older) > 1:
            old = resident.older.pop(0)
            self._store.delete(old)
            self._store.delete(fitter_key(old))

    def _load(self, plan: SessionPlan, row: GradientAuxiliary) -> Resident:
        auxiliary = Auxiliary(plan.sites, plan.auxiliary, self._device)
        fitter = make_fitter(auxiliary, plan.fitting) if plan.fit == "server" else None
        if row.key is not None:
            self._read(row.key, auxiliary, fitter)
        return Resident(row.id, auxiliary, row.version, row.key, fitter)

    def _read(self, key: str, auxiliary: Auxiliary, fitter: Fitter | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            self._store.download(key, path)
            auxiliary.load(load_file(path))
            if fitter is None or not _has_fitter(path):
                return
            self._store.download(fitter_key(key), path)
            with safe_open(path, "pt") as file:
                text = file.metadata()["state"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            fitter.load_state_dict(unpack_state(tensors, text))


def fitter_key(key: str) -> str:
    """Where the fitter's state lies, beside the auxiliary's."""
    return key.removesuffix(".safetensors") + ".fitter.safetensors"


def _has_fitter(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("fitter", "false"))
