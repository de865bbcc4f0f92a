"""Counting the bytes of all tensors that live, as they come and go. What they are for is the caller's to know."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While open, follows every storage that an operation makes, on any device, until it is freed.

    Storages are counted once, however many views share them, so the figures are what an allocator is asked for.
    Storages of fake tensors count as if they held their data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes that live."""
        self.peak = 0
        """Most bytes that lived at once."""
        self._followed: weakref.WeakKeyDictionary[Any, weakref.finalize | None] = weakref.WeakKeyDictionary()

    def adopt(self, *tensors: torch.Tensor) -> None:
        """Count tensors that were there before as well."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage())

    def leave_out(self, *tensors: torch.Tensor) -> None:
        """Count these tensors no longer, or never."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            ending = self._followed.get(storage)
            if ending is not None and ending.detach() is not None:
                self.now -= storage.nbytes()
            self._followed[storage] = None

    def restart(self) -> None:
        """Forget the peak so far; what lives stays counted."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return output

    def _follow(self, storage: Any) -> None:
        if storage in self._followed:
            return
        size = storage.nbytes()
        ending = weakref.finalize(storage, self._freed, size)
        ending.atexit = False
        self._followed[storage] = ending
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size
