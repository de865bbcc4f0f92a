"""Trainable weights and AdamW's state as named ranges that any engine, ZeRO stage and world size reads and writes.

Which ranges a rank holds is the engines' affair, where they are kept the checkpoints'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ot_ray.errors import TrainingError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")

Read = Callable[[str, str, int, int], Tensor]
"""`read(kind, name, start, end)`: float32 [end - start], elements of a flattened parameter or of its moment."""


class Piece(NamedTuple):
    """Part of one trainable parameter's float32 master, or of one of AdamW's moments of it."""

    kind: str
    """`weight`, `exp_avg` or `exp_avg_sq`."""
    name: str
    """The parameter's name in the module."""
    start: int
    """First element in the flattened parameter."""
    tensor: Tensor
    """Float32 [n] on the CPU; a copy that training does not change."""


class Shard(NamedTuple):
    """Where a rank keeps elements `start` to `start + numel` of a flattened parameter."""

    name: str
    start: int
    numel: int
    master: Tensor
    """The contiguous float32 tensor that AdamW steps; it may hold other parameters' shards and padding too."""
    offset: int
    """Where in the flattened `master` the shard begins."""

    def of(self, tensor: Tensor) -> Tensor:
        """This shard's range, as a view of the master or of a moment shaped like it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def pieces(shards: Iterable[Shard], adamw: torch.optim.Optimizer) -> Iterator[Piece]:
    """Copies of what the shards hold; moments of a parameter that was never stepped are 0."""
    for shard in shards:
        yield Piece(WEIGHT, shard.name, shard.start, _copy(shard.of(shard.master)))
        state = adamw.state.get(shard.master, {})
        for kind in MOMENTS:
            moment = _copy(shard.of(state[kind])) if kind in state else torch.zeros(shard.numel)
            yield Piece(kind, shard.name, shard.start, moment)


def restore(shards: Iterable[Shard], adamw: torch.optim.Optimizer, step: int, read: Read) -> None:
    """Fill masters and AdamW's state as they were after `step` steps; padding becomes 0 in the moments."""
    shards = list(shards)
    for master in {id(shard.master): shard.master for shard in shards}.values():
        # AdamW's fused step counts where the master lies, the others on the CPU.
        device = master.device if adamw.defaults["fused"] else torch.device("cpu")
        moments = {kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS}
        adamw.state[master] = {"step": torch.tensor(float(step), device=device), **moments}
    for shard in shards:
        write(shard, read(WEIGHT, shard.name, shard.start, shard.start + shard.numel))
        for kind in MOMENTS:
            values = read(kind, shard.name, shard.start, shard.start + shard.numel)
            write(shard, values, adamw.state[shard.master][kind])


def write(shard: Shard, values: Tensor, tensor: Tensor | None = None) -> None:
    """Put values [numel] of any floating type into the shard's range of its master, or of a moment.

    Raises:
        TrainingError: there are more or fewer values; one alone would be spread over the range.
    """
    if values.numel() != shard.numel:
        raise TrainingError(
            f"{shard.name}: {values.numel()} values were read for elements {shard.start} to "
            f"{shard.start + shard.numel}; resume with the configuration that wrote the checkpoint"
        )
    shard.of(shard.master if tensor is None else tensor).copy_(values.view(-1))


def _copy(view: Tensor) -> Tensor:
    return view.to("cpu", torch.float32, copy=True)
