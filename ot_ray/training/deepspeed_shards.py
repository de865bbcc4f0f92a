"""Where DeepSpeed keeps a rank's float32 masters at each ZeRO stage, and how working copies follow them.

Saving and restoring by these shards is shards.py's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ot_ray.training.engine import trainable
from ot_ray.training.shards import Shard


def shards_of(module: nn.Module, optimizer: Any, stage: int) -> list[Shard]:
    """This rank's shards of the trainable weights; at stage 0 every rank holds all of them.

    Args:
        optimizer: what `deepspeed.initialize` returned.
    """
    if stage == 0:
        masters = _replicated_masters(optimizer)
        pairs = [(name, masters.get(id(p), p)) for name, p in trainable(module).items()]
        return [Shard(name, 0, master.numel(), master, 0) for name, master in pairs]
    find = _fragment if stage < 3 else _partition
    found = (find(name, parameter, optimizer) for name, parameter in trainable(module).items())
    return [shard for shard in found if shard is not None]


def prepare_masters(optimizer: Any, stage: int) -> None:
    """Let go of gathered weights before masters are written."""
    if stage == 3:
        optimizer._partition_all_parameters()


@torch.no_grad()
def follow_masters(optimizer: Any, stage: int) -> None:
    """Give the working copies the values of the masters, rounded to their type; every rank calls this together."""
    if stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()
    elif not isinstance(optimizer, torch.optim.AdamW):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, high, strict=True):
                weight.copy_(master)


def _replicated_masters(optimizer: Any) -> dict[int, torch.Tensor]:
    """Without ZeRO, DeepSpeed runs AdamW bare in float32; in bfloat16 it keeps masters in lists."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(weight): master for pair in groups for weight, master in zip(*pair, strict=True)}


def _fragment(name: str, parameter: Any, zero: Any) -> Shard | None:
    """Stages 1 and 2 lay all parameters of a group end to end and cut that line into one part a rank."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return Shard(name, low.start, low.numel, master, high.start)


def _partition(name: str, parameter: Any, zero: Any) -> Shard | None:
    """Stage 3 cuts each parameter by itself into equal parts, the last ones padded."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = parameter.ds_zero_partition_rank * size
    numel = min(size, parameter.ds_numel - start)
    return Shard(name, start, numel, zero.fp32_partitioned_groups_flat[group], offset) if numel > 0 else None
