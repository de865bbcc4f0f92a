"""What one batch yields at the sites: pairs (x, g) of each customer's own rows, wherever they are to be fitted.

Where they come from is in taps.py, what they are fitted to in fitting.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ot_ray.cola.modes import Mode
from ot_ray.cola.sites import Site
from ot_ray.errors import GradientLearningError
from ot_ray.model.multi_adapter import RowGroups, group_rows


@dataclass(frozen=True)
class Pair:
    """The input of a site, and the gradient of the loss by the auxiliary's output there. Shapes are `Site`'s."""

    x: Tensor
    g: Tensor


class Batch:
    """The rows of one forward and backward pass, and what they leave behind. `Taps.batch` makes it."""

    def __init__(
        self,
        mode: Mode,
        sites: dict[str, Site],
        rows: Sequence[str | None] | None,
        mask: Tensor | None,
        device: torch.device | None,
    ) -> None:
        self._mode, self._sites, self._transfer = mode, sites, Transfer(device)
        self._found: dict[str, dict[str, list[Pair]]] = {}
        self._last: tuple[Tensor, dict[str, Tensor]] | None = None
        self._numbers: dict[str | None, int] = {None: 0} | {name: i + 1 for i, name in enumerate(mode.names)}
        owners = _owners(mode, rows, mask)
        self.rows = None if owners is None else len(owners)
        self._mask = None if mask is None else mask.detach().to("cpu", torch.bool)
        self._owners = owners
        self._places: dict[torch.device, tuple[RowGroups, dict[str, Tensor], dict[str, Tensor]]] = {}

    @property
    def customers(self) -> list[str]:
        """Those who have rows here, under the names of their pairs."""
        if self._owners is None:
            return list(self._mode.names)
        return [name for name in self._mode.names if name in self._owners]

    def groups(self, device: torch.device) -> RowGroups | None:
        """Rows by owner; None where nobody said whose they are, which mode joint does not need."""
        return None if self._owners is None else self._located(device)[0]

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
        found = self._sites[site]
        for owner in self.customers:
            if site not in self._mode.auxiliaries[owner].sites:
                continue
            share = self._mode.share(owner)
            own = self._own(found, site, owner, g, 1)
            pair = Pair(
                self._own_input(found, site, owner, x), self._transfer.send(own if share == 1.0 else own * share)
            )
            self._found.setdefault(owner, {}).setdefault(site, []).append(pair)

    def pairs(self) -> dict[str, dict[str, Pair]]:
        """By customer and site, once the backward pass is through; waits until they are where they are to be fitted.

        Raises:
            GradientLearningError: no gradient came to a site.
        """
        self._transfer.wait()
        self._last = None
        missing = sorted(
            {
                site
                for owner in self.customers
                for site in self._mode.auxiliaries[owner].sites
                if site not in self._found.get(owner, {})
            }
        )
        if missing:
            raise GradientLearningError(
                f"no gradient came to site {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; "
                "run loss.backward() inside the batch, with gradients enabled, and choose sites whose output reaches "
                "the loss (checkpointing with use_reentrant=True needs an input that has a gradient)"
            )
        return {owner: {site: _joined(pairs) for site, pairs in sites.items()} for owner, sites in self._found.items()}

    def _own_input(self, found: Site, site: str, owner: str, x: Tensor) -> Tensor:
        # Query, key and value see one and the same x, one after the other; it is cut out and sent once.
        if self._last is None or not _same(self._last[0], x):
            self._last = (x, {})
        sent = self._last[1]
        key = f"{found.layout} {owner}"
        if key not in sent:
            sent[key] = self._transfer.send(self._own(found, site, owner, x, 0 if found.layout == "embedding" else 1))
        return sent[key]

    def _own(self, found: Site, site: str, owner: str, tensor: Tensor, features: int) -> Tensor:
        """The owner's part of a tensor, without padding: [N, ...]. `features` is the number of last axes that stay."""
        if found.layout == "conv":
            return tensor if self._owners is None else tensor[self._located(tensor.device)[1][owner]]
        kept = tensor.shape[tensor.dim() - features :]
        if self._owners is None:
            return tensor.reshape(-1, *kept)
        self.check(site, tensor)
        assert self.rows is not None
        rows = tensor.unflatten(0, (self.rows, -1)) if tensor.shape[0] != self.rows else tensor
        _, by_row, by_position = self._located(tensor.device)
        if self._mask is None or rows.dim() == 1 + features:
            return rows[by_row[owner]].reshape(-1, *kept)
        if rows.shape[1] != self._mask.shape[1]:
            raise GradientLearningError(
                f"site {site} sees {rows.shape[1]} positions, the mask has {self._mask.shape[1]}; choose sites that "
                "see the positions of the mask"
            )
        return rows.flatten(0, 1)[by_position[owner]].reshape(-1, *kept)

    def _located(self, device: torch.device) -> tuple[RowGroups, dict[str, Tensor], dict[str, Tensor]]:
        """Groups, rows by owner and positions by owner (of the flattened [B * T]), on a device."""
        if device not in self._places:
            assert self._owners is not None
            by_row = {
                owner: torch.tensor([i for i, name in enumerate(self._owners) if name == owner], dtype=torch.int64)
                for owner in self.customers
            }
            by_position = {
                owner: torch.cat([row * self._mask.shape[1] + self._mask[row].nonzero()[:, 0] for row in rows])
                for owner, rows in by_row.items()
                if self._mask is not None
            }
            self._places[device] = (
                group_rows([self._numbers[name] for name in self._owners], device),
                {owner: rows.to(device) for owner, rows in by_row.items()},
                {owner: positions.to(device) for owner, positions in by_position.items()},
            )
        return self._places[device]


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
