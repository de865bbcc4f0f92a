"""Batches of gradient learning as a list of tensors and a table, as they travel, and the parts of one put together.

How they travel is the caller's affair: between ranks by rank_messages.py, to other machines by launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ot_ray.cola import Pair

Batch = Mapping[str, Mapping[str, Pair] | None]
"""Pairs by owner and site; None where an owner has no rows."""
Table = dict[str, dict[str, tuple[int, int]] | None]
"""In the place of each pair, the numbers of its x and g in the list."""


def pack_pairs(batch: Batch) -> tuple[list[Tensor], Table]:
    """Take a batch apart. What several sites have in common, as query, key and value have their x, is listed once."""
    tensors: list[Tensor] = []
    places: dict[tuple[Any, ...], int] = {}

    def place(tensor: Tensor) -> int:
        key = _memory(tensor)
        if key not in places:
            places[key] = len(tensors)
            tensors.append(tensor)
        return places[key]

    table: Table = {
        owner: None if pairs is None else {site: (place(pair.x), place(pair.g)) for site, pair in pairs.items()}
        for owner, pairs in batch.items()
    }
    return tensors, table


def unpack_pairs(tensors: Sequence[Tensor], table: Table) -> dict[str, dict[str, Pair] | None]:
    """Put a batch together again."""
    return {
        owner: None if places is None else {site: Pair(tensors[x], tensors[g]) for site, (x, g) in places.items()}
        for owner, places in table.items()
    }


def join_parts(parts: Sequence[Batch]) -> dict[str, Mapping[str, Pair] | None]:
    """One batch of the parts that several ranks have of it, each owner's positions in the ranks' order. Parts have the
    same owners."""
    joined: dict[str, Mapping[str, Pair] | None] = {}
    for owner in parts[0]:
        own = [pairs for part in parts if (pairs := part[owner]) is not None]
        joined[owner] = _joined(own) if len(own) > 1 else own[0] if own else None
    return joined


def _joined(parts: Sequence[Mapping[str, Pair]]) -> dict[str, Pair]:
    """What several sites have in common, they still have afterwards."""
    inputs: dict[tuple[Any, ...], Tensor] = {}

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        key = tuple(_memory(tensor) for tensor in tensors)
        if key not in inputs:
            inputs[key] = torch.cat(list(tensors))
        return inputs[key]

    return {
        site: Pair(joined([part[site].x for part in parts]), torch.cat([part[site].g for part in parts]))
        for site in parts[0]
    }


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two views of the same; all that are asked about are in memory at once, so that no two are taken for
    one."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
