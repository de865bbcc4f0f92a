"""Bringing a module's parameters to a rank, one at a time: whole, or only this rank's ZeRO-3 partition.

Where the values come from is the `fill` function's affair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ot_ray.errors import TrainingError

Fill = Callable[[str, int, int], Tensor]
"""`fill(name, start, end)`: elements of the flattened parameter or buffer of that name, in any floating type."""


class _Slot(NamedTuple):
    """A tensor of a module, with every place that it stands in."""

    name: str
    tensor: Any
    places: list[tuple[dict[str, Any], str]]

    def install(self, tensor: Tensor) -> None:
        for table, key in self.places:
            table[key] = tensor


def load_whole(module: nn.Module, dtype: torch.dtype, device: torch.device, fill: Fill | None) -> None:
    """Give every parameter its values, type and device; what lies on the meta device is filled.

    Raises:
        TrainingError: there is something to fill and no `fill`, or it returned another number of elements.
    """
    _check_source(module, fill)
    for slot in _parameters(module):
        if slot.tensor.is_meta:
            values = _filled(slot, torch.empty(slot.tensor.shape, dtype=dtype, device=device), fill)
            slot.install(nn.Parameter(values, slot.tensor.requires_grad))
        else:
            slot.tensor.data = slot.tensor.data.to(device, dtype)
    _load_buffers(module, dtype, device, fill)


def load_partitioned(
    module: nn.Module, dtype: torch.dtype, device: torch.device, fill: Fill | None, settings: dict[str, Any]
) -> None:
    """Partition every parameter over the ranks as ZeRO-3 does; a rank asks `fill` for its own partition alone.

    Parameters that are not on the meta device are taken from rank 0. Every rank calls this together.

    Raises:
        TrainingError: as `load_whole`.
    """
    import deepspeed

    _check_source(module, fill)
    # Given a module, it also makes linear layers let go of gathered weights between forward and backward.
    partitioner: Any = deepspeed.zero.Init(module=nn.Identity(), config_dict_or_path=settings, dtype=dtype)
    for slot in _parameters(module):
        if slot.tensor.is_meta:
            # Its memory is not written to before it is partitioned, so on a CPU it is hardly there.
            empty = torch.empty(slot.tensor.shape, dtype=dtype, device=device)
            parameter: Any = nn.Parameter(empty, slot.tensor.requires_grad)
            del empty
            partitioner._convert_to_deepspeed_param(parameter)
            parameter.partition()
            _fill_partition(parameter, slot.name, fill)
            slot.install(parameter)
        else:
            slot.tensor.data = slot.tensor.data.to(dtype)
            partitioner._convert_to_zero_parameters([slot.tensor])
    _load_buffers(module, dtype, device, fill)


def _fill_partition(parameter: Any, name: str, fill: Fill | None) -> None:
    size = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * size, parameter.ds_numel)
    end = min(start + size, parameter.ds_numel)
    # The last partitions may reach beyond the parameter; nobody must meet what memory held before.
    parameter.ds_tensor[end - start :].zero_()
    if end > start:
        parameter.ds_tensor[: end - start].copy_(_asked(fill, name, start, end))


def _load_buffers(module: nn.Module, dtype: torch.dtype, device: torch.device, fill: Fill | None) -> None:
    """Buffers keep their type, because rotary frequencies must not be rounded; with float32 they are that at least."""
    for slot, stored in _buffers(module):
        wanted = torch.float32 if dtype == torch.float32 and slot.tensor.is_floating_point() else slot.tensor.dtype
        if slot.tensor.is_meta or (stored and fill is not None):
            slot.install(_filled(slot, torch.empty(slot.tensor.shape, dtype=wanted, device=device), fill))
        else:
            slot.install(slot.tensor.to(device, wanted))


def _check_source(module: nn.Module, fill: Fill | None) -> None:
    # Before anything is partitioned, so that all ranks stop at the same place.
    hollow = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if hollow and fill is None:
        raise TrainingError(
            f"{len(hollow)} tensors are on the meta device, {hollow[0]} among them, and nothing fills them; pass `fill`"
        )


def _filled(slot: _Slot, empty: Tensor, fill: Fill | None) -> Tensor:
    """A copy of the values, because training must not write into what `fill` may keep."""
    empty.view(-1).copy_(_asked(fill, slot.name, 0, empty.numel()))
    return empty


def _asked(fill: Fill | None, name: str, start: int, end: int) -> Tensor:
    assert fill is not None, "checked before loading"
    values = fill(name, start, end)
    if values.numel() != end - start:
        raise TrainingError(
            f"{name}: {values.numel()} values were read for elements {start} to {end}; the checkpoint's tensor has "
            "another shape than the model's"
        )
    return values.view(-1)


def _parameters(module: nn.Module) -> Iterator[_Slot]:
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner._parameters, key))
    for name, parameter in list(module.named_parameters()):
        yield _Slot(name, parameter, places[id(parameter)])


def _buffers(module: nn.Module) -> Iterator[tuple[_Slot, bool]]:
    for path, owner in module.named_modules():
        for key, buffer in list(owner._buffers.items()):
            if buffer is not None:
                name = f"{path}.{key}" if path else key
                yield _Slot(name, buffer, [(owner._buffers, key)]), key not in owner._non_persistent_buffers_set
