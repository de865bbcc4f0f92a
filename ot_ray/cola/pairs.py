"""What one batch yields at the sites: pairs (x, g) of each customer's own rows, wherever they are to be fitted.

Where they come from is in taps.py, what they are fitted to in fitting.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ot_ray.cola.modes import Mode
from ot_ray.cola.products import RowSums
from ot_ray.cola.sites import Site
from ot_ray.errors import GradientLearningError


@dataclass(frozen=True)
class Pair:
    """The input of a site, and the gradient of the loss by the auxiliary's output there. Shapes are `Site`'s."""

    x: Tensor
    g: Tensor


class Batch:
    """The rows of one forward and backward pass, and what they leave behind. `Taps.batch` makes it.

    A site's x and g are kept whole, sorted by owner and without padding; they are cut up once, at the end.
    """

    def __init__(
        self,
        mode: Mode,
        sites: dict[str, Site],
        rows: Sequence[str | None] | None,
        mask: Tensor | None,
        device: torch.device | None,
    ) -> None:
        self._mode, self._sites, self._transfer = mode, sites, Transfer(device)
        self._owners = _owners(mode, rows, mask)
        self.rows = None if self._owners is None else len(self._owners)
        self._mask = None if mask is None else mask.detach().to("cpu", torch.bool)
        # In the order of their rows, so that rows that stand together need no sorting.
        here = mode.names if self._owners is None else dict.fromkeys(self._owners)
        self.customers: list[str] = [name for name in here if name is not None]
        """Those who have rows here, under the names of their pairs."""
        self._found: dict[str, list[_Kept]] = {}
        self._last: tuple[Tensor, dict[tuple[str, tuple[str, ...]], Tensor]] | None = None
        self._sums: dict[torch.device, RowSums | None] = {}
        self._orders: dict[tuple[tuple[str, ...], bool, torch.device], _Order] = {}

    def sums(self, device: torch.device) -> RowSums | None:
        """Which sum of auxiliaries each row goes through; None where all go through the same."""
        if device not in self._sums:
            self._sums[device] = None if self._owners is None else self._mode.rows(self._owners, device)
        return self._sums[device]

    def check(self, site: str, x: Tensor) -> None:
        """Refuse what a site is called with where its rows are not to be told apart.

        Raises:
            GradientLearningError: its first axis is not the batch's rows.
        """
        if self.rows is not None and (x.dim() == 0 or x.shape[0] % self.rows or not x.shape[0]):
            raise GradientLearningError(
                f"site {site} is called with {[*x.shape]}, whose first axis is not the batch's {self.rows} rows; give "
                "rows and mask of the batch that runs, or choose a site that sees every row"
            )

    def add(self, site: str, x: Tensor, g: Tensor) -> None:
        """Keep what the backward pass brings to a site; both as the module has them, rows first."""
        owners = tuple(name for name in self.customers if site in self._mode.auxiliaries[name].sites)
        if not owners:
            return
        found = self._sites[site]
        kept, sizes = self._cut(found, owners, g, 1)
        sent = self._transfer.send(self._weighed(kept, owners, sizes))
        self._found.setdefault(site, []).append(_Kept(self._input(found, owners, x), sent, owners, sizes))

    def pairs(self) -> dict[str, dict[str, Pair]]:
        """By customer and site, once the backward pass is through; waits until they are where they are to be fitted.

        Sites that saw one and the same x share its tensor. Those of a site are views of one tensor for all customers.

        Raises:
            GradientLearningError: no gradient came to a site.
        """
        self._transfer.wait()
        self._last = None
        missing = sorted(
            {site for owner in self.customers for site in self._mode.auxiliaries[owner].sites} - {*self._found}
        )
        if missing:
            raise GradientLearningError(
                f"no gradient came to site {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; "
                "run loss.backward() inside the batch, with gradients enabled, and choose sites whose output reaches "
                "the loss (checkpointing with use_reentrant=True needs an input that has a gradient)"
            )
        inputs: dict[int, tuple[Tensor, ...]] = {}
        pairs: dict[str, dict[str, list[Pair]]] = {}
        for site, kept in self._found.items():
            for part in kept:
                if id(part.x) not in inputs:
                    inputs[id(part.x)] = part.x.split(part.sizes)
                for owner, x, g in zip(part.owners, inputs[id(part.x)], part.g.split(part.sizes), strict=True):
                    pairs.setdefault(owner, {}).setdefault(site, []).append(Pair(x, g))
        return {owner: {site: _joined(found) for site, found in sites.items()} for owner, sites in pairs.items()}

    def _input(self, found: Site, owners: tuple[str, ...], x: Tensor) -> Tensor:
        # Query, key and value see one and the same x, one after the other; it is kept and sent once.
        if self._last is None or not _same(self._last[0], x):
            self._last = (x, {})
        sent, key = self._last[1], (found.layout, owners)
        if key not in sent:
            kept, _ = self._cut(found, owners, x, 0 if found.layout == "embedding" else 1)
            sent[key] = self._transfer.send(kept)
        return sent[key]

    def _weighed(self, g: Tensor, owners: tuple[str, ...], sizes: list[int]) -> Tensor:
        shares = [self._mode.share(owner) for owner in owners]
        if len({*shares}) == 1:
            return g if shares[0] == 1.0 else g * shares[0]
        precise = torch.promote_types(g.dtype, torch.float32)
        each = torch.tensor(shares, dtype=precise).repeat_interleave(torch.tensor(sizes)).to(g.device)
        return (g * each.reshape(-1, *[1] * (g.dim() - 1))).to(g.dtype)

    def _cut(self, found: Site, owners: tuple[str, ...], tensor: Tensor, features: int) -> tuple[Tensor, list[int]]:
        """What owners have of a tensor, [N, ...] without padding and one after another, and how much each has.
        `features` is the number of last axes that stay."""
        tensor = tensor.detach()
        kept = tensor.shape[tensor.dim() - features :]
        if self._owners is None:
            flat = (tensor if found.layout == "conv" else tensor.reshape(-1, *kept)).contiguous()
            return flat, [flat.shape[0]]
        if found.layout == "conv":
            order = self._order(owners, False, tensor.device)
            return order.of(tensor), order.sizes
        self.check(found.name, tensor)
        assert self.rows is not None
        rows = tensor.unflatten(0, (self.rows, -1)) if tensor.shape[0] != self.rows else tensor
        if self._mask is None or rows.dim() == 1 + features:
            order = self._order(owners, False, tensor.device)
            flat = order.of(rows).reshape(-1, *kept).contiguous()
            each = flat.shape[0] // max(1, sum(order.sizes))
            return flat, [size * each for size in order.sizes]
        if rows.shape[1] != self._mask.shape[1]:
            raise GradientLearningError(
                f"site {found.name} sees {rows.shape[1]} positions, the mask has {self._mask.shape[1]}; choose sites "
                "that see the positions of the mask"
            )
        order = self._order(owners, True, tensor.device)
        return order.of(rows.flatten(0, 1)).reshape(-1, *kept).contiguous(), order.sizes

    def _order(self, owners: tuple[str, ...], by_position: bool, device: torch.device) -> _Order:
        key = (owners, by_position, device)
        if key not in self._orders:
            assert self._owners is not None
            self._orders[key] = _sorted(self._owners, owners, self._mask if by_position else None, device)
        return self._orders[key]


class _Kept(NamedTuple):
    """What one backward pass brought to a site, of its owners one after another."""

    x: Tensor
    g: Tensor
    owners: tuple[str, ...]
    sizes: list[int]


class _Order(NamedTuple):
    """Rows, or positions of the flattened rows, of owners one after another."""

    sizes: list[int]
    """How many each owner has."""
    places: Tensor | None
    """Int64: which; None where these are all, in order."""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous() if self.places is None else tensor[self.places]


def _sorted(
    all_owners: Sequence[str | None], owners: Sequence[str], mask: Tensor | None, device: torch.device
) -> _Order:
    rows = [[row for row, name in enumerate(all_owners) if name == owner] for owner in owners]
    places = torch.tensor([row for own in rows for row in own], dtype=torch.int64)
    sizes, count = [len(own) for own in rows], len(all_owners)
    if mask is not None:
        kept = mask[places]
        sizes = [int(part.sum()) for part in kept.split(sizes)]
        count = mask.numel()
        places = torch.arange(count).view(mask.shape)[places][kept]
    same = len(places) == count and bool((places == torch.arange(count)).all())
    return _Order(sizes, None if same else places.to(device))


class Transfer:
    """Moves tensors to a device while the stream that makes them goes on.

    Args:
        device: where to; None leaves them where they are.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor over there, detached; it holds its values after `wait` only."""
        tensor = tensor.detach()
        if self._device is None or tensor.device == self._device:
            return tensor
        if not tensor.is_cuda or self._device.type != "cpu":
            return tensor.to(self._device)
        if tensor.device not in self._streams:
            self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream = self._streams[tensor.device]
        # Copies run beside the backward pass only into pinned memory, and on a stream of their own.
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            target.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return target

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        for stream in self._streams.values():
            stream.synchronize()


def _owners(mode: Mode, rows: Sequence[str | None] | None, mask: Tensor | None) -> list[str | None] | None:
    if mask is not None and mask.dim() != 2:
        raise GradientLearningError(f"the mask is {[*mask.shape]}; give [B, T], true where there is no padding")
    if rows is None:
        if mode.needs_rows:
            raise GradientLearningError("the batch does not say whose its rows are; give rows, one customer for each")
        return None if mask is None else [mode.owner(None)] * len(mask)
    if mask is not None and len(rows) != len(mask):
        raise GradientLearningError(
            f"rows name {len(rows)} customers, the mask has {len(mask)} rows; give one for each"
        )
    owners = [mode.owner(customer) for customer in rows]
    unknown = sorted({name for name in owners if name is not None} - {*mode.names})
    if unknown or not owners:
        raise GradientLearningError(
            f"rows name {', '.join(unknown) or 'nobody'}; the customers are {', '.join(mode.names)}"
        )
    return owners


def _same(one: Tensor, other: Tensor) -> bool:
    # Both are in memory, so that no other tensor can have come to stand there.
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def _joined(pairs: list[Pair]) -> Pair:
    if len(pairs) == 1:
        return pairs[0]
    return Pair(torch.cat([pair.x for pair in pairs]), torch.cat([pair.g for pair in pairs]))
