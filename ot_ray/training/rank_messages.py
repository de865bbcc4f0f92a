"""Tensors and JSON between the ranks of a process group, over the CPUs and without pickle.

What they mean is the caller's affair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Message(NamedTuple):
    """What one rank tells others."""

    value: Any
    """As JSON has it."""
    tensors: list[Tensor]
    """On the CPU, of any type."""


class RankMessages:
    """Every rank of the default process group makes one, and calls the same methods in the same order."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # NCCL knows tensors on GPUs only.
        self._group: Any = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else dist.group.WORLD

    def gather(self, message: Message) -> list[Message] | None:
        """All ranks' messages in their order, on rank 0; None elsewhere."""
        if self.rank:
            for tensor in _on_the_wire(message):
                dist.send(tensor, 0, self._group)
            return None
        others = range(1, self.world_size)
        return [message, *(_received(lambda tensor, r=r: dist.recv(tensor, r, self._group)) for r in others)]

    def broadcast(self, message: Message | None) -> Message:
        """Rank 0's message, on every rank; the others give None."""
        if message is None:
            return _received(lambda tensor: dist.broadcast(tensor, 0, self._group))
        for tensor in _on_the_wire(message):
            dist.broadcast(tensor, 0, self._group)
        return message

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, on every rank."""
        added = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(added, group=self._group)
        return added.tolist()


def _on_the_wire(message: Message) -> list[Tensor]:
    """The length of a text, the text, and every tensor's bytes."""
    tensors = [tensor.detach().cpu().contiguous() for tensor in message.tensors]
    kinds = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    text = torch.frombuffer(bytearray(json.dumps([message.value, kinds]).encode()), dtype=torch.uint8)
    return [torch.tensor([text.numel()]), text, *(_bytes(tensor) for tensor in tensors if tensor.numel())]


def _received(receive: Any) -> Message:
    length = torch.zeros(1, dtype=torch.int64)
    receive(length)
    text = torch.zeros(int(length), dtype=torch.uint8)
    receive(text)
    value, kinds = json.loads(text.numpy().tobytes())
    tensors = []
    for dtype, shape in kinds:
        tensors.append(torch.empty(shape, dtype=getattr(torch, dtype)))
        if tensors[-1].numel():
            receive(_bytes(tensors[-1]))
    return Message(value, tensors)


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8)
