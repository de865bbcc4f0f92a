"""Outputs of many auxiliaries at one site, in few products; nothing of any auxiliary stays in the graph of a pass.

Which rows go through what is in modes.py. Letters: B rows, N positions of a row, I inputs, O outputs, P sums of
auxiliaries, R ranks of one sum, one after another and padded with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ot_ray.cola.auxiliaries import Auxiliary
from ot_ray.cola.sites import Site
from ot_ray.errors import GradientLearningError
from ot_ray.model.multi_adapter import RowGroups, group_rows

Summands = Sequence[tuple[float, Auxiliary]]
"""Shares and auxiliaries whose outputs are added up."""


class RowSums:
    """Which sum of auxiliaries each row of a pass goes through.

    Args:
        numbers: of the sums, one a row; None for rows that go through none.
        device: of the pass.
    """

    def __init__(self, numbers: Sequence[int | None], device: torch.device) -> None:
        self.numbers, self.device = tuple(numbers), device
        self.placed: dict[tuple[int, ...], _Placed | None] = {}

    @cached_property
    def groups(self) -> RowGroups:
        """Rows by sum, numbered from 1 on; 0 is none."""
        return group_rows([0 if number is None else number + 1 for number in self.numbers], self.device)


class _Placed(NamedTuple):
    """Where the rows of a bundle are."""

    places: Tensor | None
    """Int64 [b]: the rows; None for all of them."""
    used: tuple[int, ...]
    """Those of the bundle's sums that have rows here, by their places in the bundle."""
    which: Tensor | None
    """Int64 [b]: which of the used ones each row has; None where they stand in order, with as many rows each."""


class SiteSums:
    """What the sums of a mode are at one site: bundles of low rank, and the rest, one auxiliary after another.

    Args:
        sums: all of them; those without an auxiliary here add nothing.
    """

    def __init__(self, site: Site, sums: Sequence[Summands]) -> None:
        self.site = site
        here = [[(share, own) for share, own in summands if site.name in own.sites] for summands in sums]
        low = [[s for s in summands if _is_low_rank(site, s[1])] for summands in here]
        self.rest = [[s for s in summands if not _is_low_rank(site, s[1])] for summands in here]
        self.bundles = _bundled(site, low)
        auxiliaries = {id(own): own for summands in here for _, own in summands}.values()
        self._read = [(own.tensors, f"{site.name}.{part}") for own in auxiliaries for part in own.parts(site.name)]

    def delta(self, x: Tensor, rows: RowSums | None) -> Tensor | None:
        """What the site's output gets added, with a graph of x alone; None for nothing.

        Args:
            x: [B, ..., I] or [B * T, I], as the module is called.
            rows: None where all rows go through the first sum.

        Returns:
            [B, ..., O] at a linear map; elsewhere as `Auxiliary.delta` has it. In the precision of the tensors.
        """
        return _Delta.apply(x, self, rows) if self._read else None

    def low_rank(self, tensor: Tensor, rows: RowSums | None, backwards: bool = False) -> Tensor | None:
        """The bundles' outputs [B, N, O] for x, or, backwards, the gradients [B, N, I] for those by the outputs."""
        parts = tensor.reshape(1 if rows is None else len(rows.numbers), -1, tensor.shape[-1])
        total: Tensor | None = None
        for bundle in self.bundles:
            placed = _EVERYWHERE if rows is None else bundle.placed(rows)
            if placed is None:
                continue
            own = bundle.product(parts if placed.places is None else parts[placed.places], placed, backwards)
            if placed.places is not None:
                own = own.new_zeros(parts.shape[0], *own.shape[1:]).index_copy_(0, placed.places, own)
            total = own if total is None else total + own
        return total

    def others(self, x: Tensor, rows: RowSums | None) -> Tensor | None:
        """What is not of low rank, rows where they were; zeros in those that have nothing."""
        if not any(self.rest):
            return None
        if rows is None:
            return _sum(self.rest[0], self.site.name, x)
        groups = rows.groups
        parts = groups.split(x)
        outputs = [
            _sum(self.rest[number - 1], self.site.name, part) if number else None
            for number, part in zip(groups.adapters, parts, strict=True)
        ]
        some = next((output for output in outputs if output is not None), None)
        if some is None:
            return None
        return groups.join(
            [
                some.new_zeros(part.shape[0], *some.shape[1:]) if output is None else output.to(some.dtype)
                for output, part in zip(outputs, parts, strict=True)
            ]
        )

    def versions(self) -> list[int]:
        """Of the tensors that a pass reads here."""
        tensors = [holder[name] for holder, name in self._read]
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class _Delta(torch.autograd.Function):
    """`SiteSums` with a backward pass that reads the auxiliaries again, so that no copy of them waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: SiteSums, rows: RowSums | None) -> Tensor | None:
        with torch.autocast(x.device.type, enabled=False):
            low, rest = sums.low_rank(x, rows) if sums.bundles else None, sums.others(x, rows)
        ctx.sums, ctx.rows, ctx.like = sums, rows, (x.shape, x.dtype)
        ctx.low, ctx.rest = low is not None, rest is not None
        if ctx.needs_input_grad[0]:
            ctx.versions = sums.versions()
            if ctx.rest:
                ctx.save_for_backward(x)
        if low is not None:
            total = low if rest is None else low + rest.reshape(low.shape)
            return total.reshape(*x.shape[:-1], sums.site.outputs)
        return rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] - its stub names no types
        sums: SiteSums = ctx.sums
        if sums.versions() != ctx.versions:
            raise GradientLearningError(
                f"an auxiliary at site {sums.site.name} changed between the forward and the backward pass; fit it after"
            )
        (shape, dtype), total = ctx.like, None
        if ctx.low:
            low = sums.low_rank(grads[0], ctx.rows, backwards=True)
            total = None if low is None else low.reshape(shape).to(dtype)
        if ctx.rest:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_(True)
                output = sums.others(x, ctx.rows)
            assert output is not None
            (rest,) = torch.autograd.grad(output, x, grads[0].reshape(output.shape).to(output.dtype))
            total = rest if total is None else total + rest
        return total, None, None


class _Bundle:
    """Sums of low rank whose ranks are alike, so that they go as one batched product."""

    def __init__(self, site: Site, rank: int, sums: Sequence[tuple[int, Summands]]) -> None:
        self._inner, self._outer = f"{site.name}.lora_A.weight", f"{site.name}.lora_B.weight"
        self._rank, self._terms = rank, [summands for _, summands in sums]
        self._numbers = tuple(number for number, _ in sums)
        self._scales = torch.zeros(len(sums), 1, rank, dtype=torch.float64)
        for place, summands in enumerate(self._terms):
            scales = [s * own.config.scale for s, own in summands for _ in range(own.config.rank)]
            self._scales[place, 0, : len(scales)] = torch.tensor(scales, dtype=torch.float64)
        self._placed_scales: dict[tuple[tuple[int, ...], torch.device, torch.dtype], Tensor] = {}

    def placed(self, rows: RowSums) -> _Placed | None:
        """Where its rows are; None where it has none. Sites that are alike share the answer."""
        if self._numbers not in rows.placed:
            rows.placed[self._numbers] = _place(self._numbers, rows)
        return rows.placed[self._numbers]

    def product(self, parts: Tensor, placed: _Placed, backwards: bool) -> Tensor:
        """[b, N, O] of [b, N, I]; backwards the other way round."""
        terms = [self._terms[place] for place in placed.used]
        inner, outer = self._factors(terms, self._inner, 0), self._factors(terms, self._outer, 1)
        inner, outer = inner.to(parts.device), outer.to(parts.device)
        first, second = (outer, inner) if backwards else (inner.mT, outer.mT)
        scales = self._scales_of(placed.used, first)
        given = parts.to(first.dtype)
        if _is_dearer(first, second, parts.numel() // parts.shape[-1]):
            return _batched(given, torch.bmm(first * scales, second), placed.which)
        return _batched(_batched(given, first, placed.which, scales), second, placed.which)

    def _scales_of(self, used: tuple[int, ...], like: Tensor) -> Tensor:
        key = (used, like.device, like.dtype)
        if key not in self._placed_scales:
            self._placed_scales[key] = self._scales[list(used)].to(like)
        return self._placed_scales[key]

    def _factors(self, terms: Sequence[Summands], name: str, axis: int) -> Tensor:
        """[P, R, I] or, with axis 1, [P, O, R]."""
        each = [
            summands[0][1].tensors[name]
            if len(summands) == 1
            else torch.cat([own.tensors[name] for _, own in summands], axis)
            for summands in terms
        ]
        short = [self._rank - factor.shape[axis] for factor in each]
        if any(short):
            each = [F.pad(f, (0, 0, 0, n) if axis == 0 else (0, n)) for f, n in zip(each, short, strict=True)]
        return each[0][None] if len(each) == 1 else torch.stack(each)


_EVERYWHERE = _Placed(None, (0,), None)


def _place(numbers: Sequence[int], rows: RowSums) -> _Placed | None:
    members = [row for row, number in enumerate(rows.numbers) if number in numbers]
    if not members:
        return None
    # In the order of the rows, so that rows that stand together need no sorting.
    used = list(dict.fromkeys(rows.numbers[row] for row in members))
    index = [used.index(rows.numbers[row]) for row in members]
    each = len(members) // len(used)
    in_order = index == [place for place in range(len(used)) for _ in range(each)]
    everywhere = len(members) == len(rows.numbers)
    return _Placed(
        None if everywhere else torch.tensor(members, device=rows.device),
        tuple(numbers.index(number) for number in used),
        None if in_order else torch.tensor(index, device=rows.device),
    )


def _batched(parts: Tensor, factors: Tensor, which: Tensor | None, scales: Tensor | None = None) -> Tensor:
    """[b, N, features] by [P, features, out]: each row by its own, to [b, N, out]."""
    if which is not None:
        factors, scales = factors[which], None if scales is None else scales[which]
    found = torch.bmm(parts.reshape(len(factors), -1, parts.shape[-1]), factors)
    found = found if scales is None else found.mul_(scales)
    return found.reshape(*parts.shape[:-1], factors.shape[-1])


def _is_dearer(first: Tensor, second: Tensor, positions: int) -> bool:
    """Whether two products by [P, I, R] and [P, R, O] cost more than making one of them, [P, I, O], and using that, as
    with many customers' factors in one sum."""
    count, inputs, rank = first.shape
    outputs = second.shape[-1]
    return positions * (rank * (inputs + outputs) - inputs * outputs) > count * rank * inputs * outputs


def _is_low_rank(site: Site, auxiliary: Auxiliary) -> bool:
    """Whether it is two products of positions by matrices."""
    return site.layout == "linear" and auxiliary.config.kind == "low_rank"


def _bundled(site: Site, sums: Sequence[Summands]) -> list[_Bundle]:
    # Ranks that are not within a factor of two would cost more as zeros than as a product of their own.
    alike: dict[tuple[int, torch.dtype, torch.device], list[tuple[int, Summands]]] = {}
    for number, summands in enumerate(sums):
        if summands:
            tensor = summands[0][1].tensors[f"{site.name}.lora_A.weight"]
            key = (_rank(summands).bit_length(), tensor.dtype, tensor.device)
            alike.setdefault(key, []).append((number, summands))
    return [_Bundle(site, max(_rank(summands) for _, summands in found), found) for found in alike.values()]


def _rank(summands: Summands) -> int:
    return sum(own.config.rank for _, own in summands)


def _sum(summands: Summands, site: str, x: Tensor) -> Tensor | None:
    total: Tensor | None = None
    for share, own in summands:
        parts = {part: tensor.detach().to(x.device) for part, tensor in own.parts(site).items()}
        found = own.delta(site, x, parts)
        found = found if share == 1.0 else share * found
        total = found if total is None else total + found
    return total
