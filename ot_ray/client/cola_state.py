"""Where a trainer on a customer's device keeps its state: one file, whole at any moment, without pickle.

What is in it is cola_trainer.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ot_ray.cola import pack_state, unpack_state
from ot_ray.errors import GradientLearningError
from ot_ray.store.partial import disk_errors, partial_file

_KEY, _FORMAT = "cola-trainer", "1"


class StateFile:
    """The state of one trainer; without a folder, nothing is kept.

    Args:
        folder: of the state's own; made where it is not there.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self._path = None if folder is None else Path(folder) / "trainer.safetensors"

    def write(self, state: dict[str, Any]) -> None:
        """Replace the state, in one step. Raises StoreError."""
        if self._path is None:
            return
        tensors, text = pack_state(state)
        data = save({name: tensor.cpu() for name, tensor in tensors.items()}, {_KEY: _FORMAT, "state": text})
        with disk_errors(f"cannot write {self._path}"), partial_file(self._path) as file:
            file.write(data)

    def read(self) -> dict[str, Any] | None:
        """The last state; None where there is none.

        Raises:
            GradientLearningError: the file is none of a trainer's.
            StoreError: it cannot be read.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            with disk_errors(f"cannot read {self._path}"), safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                # Copies: the file is replaced while these are in use.
                tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
        except SafetensorError as error:
            raise GradientLearningError(f"{self._path} is no state of a trainer: {error}; use another folder") from None
        if metadata.get(_KEY) != _FORMAT:
            raise GradientLearningError(f"{self._path} is no state of a trainer of this version; use another folder")
        return unpack_state(tensors, metadata["state"])
