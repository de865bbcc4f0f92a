"""Tensors as arrays that Ray's object store holds as they are: copied once on the way in, never on the way out.

Where they go is the caller's affair; no tensor is pickled on the way."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ot_ray.cola import Pair, Taken, pack_state, unpack_state
from ot_ray.training.gradient_parts import Batch, Table, pack_pairs, unpack_pairs

# The object store puts large arrays on such addresses. The same product on another one may round otherwise.
_ALIGNED = 64
_STAND_INS = {1: torch.uint8, 2: torch.uint16}


class SharedTensor(NamedTuple):
    """A tensor as an array, whose type is another where numpy has none such: bfloat16 is held as uint16."""

    dtype: str
    array: numpy.ndarray

    @classmethod
    def of(cls, tensor: Tensor) -> SharedTensor:
        """The tensor's own memory where it is on the CPU and contiguous, else a copy."""
        tensor = tensor.detach().cpu().contiguous()
        name = str(tensor.dtype).removeprefix("torch.")
        if not hasattr(numpy, name):
            tensor = tensor.view(_STAND_INS[tensor.itemsize])
        return cls(name, tensor.numpy())

    def tensor(self, copy: bool = False) -> Tensor:
        """The tensor in the array's memory, which must not be written to; or in memory of its own."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(self.array).view(getattr(torch, self.dtype))
        return tensor.clone() if copy or tensor.data_ptr() % _ALIGNED else tensor


class SharedBatch(NamedTuple):
    """A batch as `pack_pairs` takes it apart: what several sites have in common is in the object store once."""

    tensors: list[SharedTensor]
    table: Table

    @classmethod
    def of(cls, batch: Batch) -> SharedBatch:
        """The pairs' own memory, where that can be."""
        tensors, table = pack_pairs(batch)
        return cls([SharedTensor.of(tensor) for tensor in tensors], table)

    def pairs(self) -> dict[str, dict[str, Pair] | None]:
        """The batch, in the arrays' memory."""
        return unpack_pairs([tensor.tensor() for tensor in self.tensors], self.table)


class SharedState(NamedTuple):
    """A state as `pack_state` takes it apart."""

    tensors: dict[str, SharedTensor]
    text: str

    @classmethod
    def of(cls, state: Any) -> SharedState:
        """A state's own tensors, and the rest."""
        tensors, text = pack_state(state)
        return cls({name: SharedTensor.of(tensor) for name, tensor in tensors.items()}, text)

    def owned(self) -> SharedState:
        """The same in memory of its own, so that the object store or the state's owner may do as they like."""
        return SharedState({name: SharedTensor(t.dtype, t.array.copy()) for name, t in self.tensors.items()}, self.text)

    def state(self) -> Any:
        """The state, in memory of its own."""
        return unpack_state({name: tensor.tensor(copy=True) for name, tensor in self.tensors.items()}, self.text)


class SharedTaken(NamedTuple):
    """What became of a batch (`Taken`)."""

    number: int
    steps: int
    tensors: dict[str, SharedTensor] | None
    refused: str | None

    @classmethod
    def of(cls, taken: Taken) -> SharedTaken:
        """The same with arrays."""
        tensors = taken.tensors
        arrays = None if tensors is None else {name: SharedTensor.of(tensor) for name, tensor in tensors.items()}
        return cls(taken.number, taken.steps, arrays, taken.refused)

    def taken(self) -> Taken:
        """The same with tensors, in memory of their own."""
        arrays = self.tensors
        tensors = None if arrays is None else {name: array.tensor(copy=True) for name, array in arrays.items()}
        return Taken(self.number, self.steps, tensors, self.refused)
