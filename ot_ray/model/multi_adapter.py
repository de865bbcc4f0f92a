"""The base model once, and many adapters around it: one forward pass in which each row has an adapter of its own.

Making plug-in models is split.py's part; which adapters are in memory, and which rows run together, is the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ot_ray.errors import UnsupportedModelError
from ot_ray.model.families import check_maps_are_called, family_of, layers_of
from ot_ray.model.split import SplitPlan, depth_of, with_layers

BASE = 0
"""The adapter index of the base model's own layers."""


@dataclass(frozen=True)
class RowGroups:
    """The rows of one pass, sorted by adapter; `group_rows` makes it."""

    rows: int
    adapters: tuple[int, ...]
    """One a group."""
    sizes: tuple[int, ...]
    order: torch.Tensor | None
    """Int64 [B]: the row that stands in each place once rows are sorted; None where they are already."""
    back: torch.Tensor | None
    """Int64 [B]: the place of each row in that order."""

    def split(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each adapter's rows of [B, ...], or of [B * T, ...] as OPT's MLP has it; a part is [its rows, T, ...]."""
        rows = inputs.unflatten(0, (self.rows, -1)) if inputs.shape[0] != self.rows else inputs
        return (rows if self.order is None else rows[self.order]).split(self.sizes)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, ...]: the rows that `split` made parts of, where they were."""
        output = torch.cat(list(parts))
        return output if self.back is None else output[self.back]


class _Pass:
    """What the grouped modules of one model know of the pass that runs."""

    def __init__(self) -> None:
        self.groups = RowGroups(0, (BASE,), (0,), None, None)


class RowGrouped(nn.Module):
    """A module of an adapter layer that holds tensors itself (a linear map or a norm), one for each adapter.

    Rows of an adapter go through that adapter's own module, so that nothing of one adapter enters another's rows.
    """

    def __init__(self, base: nn.Module, current: _Pass) -> None:
        super().__init__()
        self.base = base
        # Not registered: they belong to the plug-in models that they come from.
        self.adapters: dict[int, nn.Module] = {}
        self._current = current

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Takes [B, ...], or [B * T, ...] as OPT's MLP has it."""
        groups = self._current.groups
        if len(groups.adapters) == 1:
            return self.adapters.get(groups.adapters[0], self.base)(inputs)
        parts = zip(groups.adapters, groups.split(inputs), strict=True)
        output = groups.join([self.adapters.get(adapter, self.base)(part) for adapter, part in parts])
        return output.flatten(0, 1) if inputs.shape[0] != groups.rows else output


class MultiAdapter:
    """A full model and the adapters that were attached to it. Letters: B rows, T positions, V vocabulary.

    Attention, the key-value cache, the middle, embeddings and the head see the whole batch; in the adapter layers
    every linear map and norm (with a bottleneck behind it, where there is one) sees the rows of its adapter.
    Gradients flow as they do in the plug-in models themselves, into the very parameters of those.

    Adapters may be attached and detached from any thread; passes run one at a time.

    Args:
        base: a causal language model; it is left as it was, and shares all its tensors with `model` here.

    Raises:
        UnsupportedModelError: it is no language model, or passes by its own linear maps.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        if family_of(base).task != "text":
            raise UnsupportedModelError(
                f"model_type is {base.config.model_type!r}, which takes images; rows with adapters of their own are "
                "for language models"
            )
        check_maps_are_called(base.config)
        self.model = with_layers(base, range(depth_of(base)), share=True).train(base.training)
        self._current = _Pass()
        self._running, self._attaching = threading.Lock(), threading.Lock()
        self._grouped: dict[int, dict[str, RowGrouped]] = {}
        self._positions: dict[int, list[int]] = {}
        self._next = BASE + 1
        self._last: tuple[tuple[int, ...], RowGroups] | None = None

    def attach(self, plugged: PreTrainedModel, plan: SplitPlan) -> int:
        """Take in the adapter layers of a plug-in model of this base, as `plug_in` made it.

        Returns:
            The adapter's index, which is never given again.

        Raises:
            AttributeError: the model lacks a module of the base's; nothing was taken in.
        """
        positions = plan.adapter_positions(depth_of(self.model))
        with self._attaching:
            # All are found before any is kept, so that a model of another shape leaves nothing behind.
            found = [
                (grouped, layers_of(plugged)[position].get_submodule(name))
                for position in positions
                for name, grouped in self._grouped_leaves(position).items()
            ]
            adapter, self._next = self._next, self._next + 1
            for grouped, module in found:
                grouped.adapters[adapter] = module
            self._positions[adapter] = positions
        return adapter

    def detach(self, adapter: int) -> None:
        """Forget an adapter that no row of a later pass has."""
        with self._attaching:
            for position in self._positions.pop(adapter):
                for grouped in self._grouped[position].values():
                    del grouped.adapters[adapter]

    def __call__(self, adapters: Sequence[int], **inputs: Any) -> Any:
        """A pass of the model.

        Args:
            adapters: the adapter index of each of the B rows.
            inputs: what the model's own `forward` takes, `input_ids` of [B, T] among it.

        Raises:
            KeyError: an index that is not attached.
        """
        if unknown := {adapter for adapter in adapters if adapter != BASE and adapter not in self._positions}:
            raise KeyError(f"adapters {sorted(unknown)} are not attached")
        with self._running:
            self._current.groups = self._group(tuple(adapters))
            return self.model(**inputs)

    def _group(self, adapters: tuple[int, ...]) -> RowGroups:
        # Steps of decoding come with the same rows again and again.
        if self._last is None or self._last[0] != adapters:
            self._last = (adapters, group_rows(adapters, self.model.device))
        return self._last[1]

    def _grouped_leaves(self, position: int) -> dict[str, RowGrouped]:
        """The grouped modules of a layer, which are put in when the first adapter comes that has this layer."""
        if position not in self._grouped:
            layer = layers_of(self.model)[position]
            found: dict[str, RowGrouped] = {}
            for name in list(leaf_names(layer)):
                parent, _, own = name.rpartition(".")
                found[name] = RowGrouped(layer.get_submodule(name), self._current).train(layer.training)
                setattr(layer.get_submodule(parent), own, found[name])
            self._grouped[position] = found
        return self._grouped[position]


def leaf_names(layer: nn.Module) -> Iterator[str]:
    """Names, inside a layer, of the modules that hold tensors themselves; those inside another such one go with it."""
    taken: list[str] = []
    for name, module in layer.named_modules():
        holds = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if holds and not any(name.startswith(f"{above}.") for above in taken):
            if not name:
                raise UnsupportedModelError(
                    f"{type(layer).__name__} holds tensors of its own, outside any linear map or norm, so that its "
                    "rows cannot have adapters of their own"
                )
            taken.append(name)
            yield name


def group_rows(adapters: Sequence[int], device: torch.device) -> RowGroups:
    """Group rows, given the adapter index of each."""
    order = sorted(range(len(adapters)), key=adapters.__getitem__)
    kinds = sorted(set(adapters))
    sizes = tuple(adapters.count(kind) for kind in kinds)
    if order == list(range(len(adapters))):
        return RowGroups(len(adapters), tuple(kinds), sizes, None, None)
    places = torch.tensor(order, device=device)
    return RowGroups(len(adapters), tuple(kinds), sizes, places, places.argsort())
