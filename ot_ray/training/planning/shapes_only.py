"""Running a model for its shapes alone: floating tensors are fake and hold no data, integers and masks are real.

Real integers let code look at positions, labels and masks as it always does, so the very pass that trains is
run; what its tensors weigh is live_bytes.py's to count."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class ShapesOnly(TorchDispatchMode):
    """While open, operations may mix fake tensors with real integers and masks on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode()

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and type on the CPU that holds no data."""
        with self._fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            # How many elements a mask takes is known only while it is real.
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map_only(torch.Tensor, self._without_data, (args, kwargs))
        elif tensors or not self._makes_floats(func, args, kwargs):
            return func(*args, **kwargs)
        with self._fake:
            return func(*args, **kwargs)

    def _without_data(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake(tensor)

    def _makes_floats(self, func: Any, args: Any, kwargs: Any) -> bool:
        with self._fake:
            made = func(*args, **kwargs)
        return isinstance(made, torch.Tensor) and made.is_floating_point()


def _places(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero().unbind(1)
