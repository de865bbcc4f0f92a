"""A frozen language model as gradient learning's server uses it: rows of many customers in, pairs (x, g) out.

Whose auxiliaries the rows go through is the mode's affair; fitting is fitting.py's and fits.py's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ot_ray.cola.modes import Mode
from ot_ray.cola.pairs import Pair
from ot_ray.cola.sites import Site
from ot_ray.cola.taps import Taps
from ot_ray.errors import GradientLearningError
from ot_ray.model.distill import body_output
from ot_ray.model.losses import HEAD_TOKENS, IGNORED, LanguageHead


@dataclass(frozen=True)
class CustomerRows:
    """Rows of text, each a customer's. Letters: B rows, T positions. Padding stands on the right."""

    input_ids: Tensor
    """Int64 [B, T]."""
    customers: tuple[str | None, ...]
    """Whose each row is; None for rows that nobody learns from."""
    labels: Tensor
    """Int64 [B, T], those of the inputs themselves, not shifted; -100 is not learnt."""
    mask: Tensor | None = None
    """Bool [B, T], false on padding; None where there is none."""
    position_ids: Tensor | None = None
    """Int64 [B, T], where documents are packed into rows: each begins at 0."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        others = {"labels": self.labels, "mask": self.mask, "position_ids": self.position_ids}
        odd = {name: [*t.shape] for name, t in others.items() if t is not None and t.shape != shape}
        if self.input_ids.dim() != 2 or len(self.customers) != shape[0] or odd:
            raise GradientLearningError(
                f"input_ids are {[*shape]}, customers {len(self.customers)}, {odd}; give [B, T] each, and one "
                "customer a row"
            )
        if self.mask is not None and bool((self.mask[:, 1:].bool() & ~self.mask[:, :-1].bool()).any()):
            raise GradientLearningError("the mask has padding before a token; put padding on the right of rows")

    def to(self, device: torch.device) -> CustomerRows:
        """The same on a device."""
        names = ("input_ids", "labels", "mask", "position_ids")
        moved = {name: None if getattr(self, name) is None else getattr(self, name).to(device) for name in names}
        return replace(self, **moved)

    def learnt(self) -> dict[str, int]:
        """How many labels each customer learns from."""
        wanted = self._wanted().sum(dim=1).tolist()
        found: dict[str, int] = {}
        for customer, count in zip(self.customers, wanted, strict=True):
            if customer is not None:
                found[customer] = found.get(customer, 0) + int(count)
        return found

    def _wanted(self) -> Tensor:
        # The first label is predicted by nothing.
        wanted = self.labels != IGNORED
        wanted[:, 0] = False
        return wanted if self.mask is None else wanted & self.mask.bool()

    def weighed(self, learnt: Mapping[str, int] | None = None) -> tuple[Tensor, Tensor]:
        """Labels without those of padding and of nobody's rows, and the share of each in its customer's mean.

        Args:
            learnt: how many labels each customer learns from; unset, as many as there are here. Ranks that have
                parts of one batch give those of the whole.

        Returns:
            Int64 [B, T] and float32 [B, T].
        """
        learnt = self.learnt() if learnt is None else learnt
        own = [1.0 / max(1, learnt.get(c, 0)) if c is not None else 0.0 for c in self.customers]
        wanted = (
            self._wanted() & torch.tensor([c is not None for c in self.customers], device=self.labels.device)[:, None]
        )
        shares = torch.tensor(own, dtype=torch.float32, device=self.labels.device)[:, None] * wanted
        return self.labels.masked_fill(~wanted, IGNORED), shares


@dataclass(frozen=True)
class Passed:
    """What one forward and backward pass yields."""

    pairs: dict[str, dict[str, Pair]]
    """By owner of an auxiliary (`joint` in that mode) and site."""
    losses: dict[str, float]
    """Each customer's mean cross-entropy, in nats, under the auxiliaries that its rows went through."""
    tokens: dict[str, int]
    """How many labels that is the mean of."""


class BasePass(nn.Module):
    """Forward and backward passes of a frozen causal language model, for rows of many customers at once.

    The loss is the sum over customers of each one's mean cross-entropy (`customers_loss`), so that nobody's gradient
    depends on who else is there; the logits of a whole batch never exist.

    Args:
        model: its parameters are frozen from here on; a GPU's passes run where it is.
        sites: that auxiliaries may have.
        device: where pairs are to be fitted; unset, they stay where they arise.
        head_tokens: positions whose logits exist at once.

    Raises:
        SiteError: a site is not one of the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, Site],
        device: torch.device | str | None = None,
        head_tokens: int = HEAD_TOKENS,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.sites = dict(sites)
        self.head = LanguageHead(model, head_tokens)
        self._device = device

    def forward(
        self, rows: CustomerRows, mode: Mode, merged: bool = False, learnt: Mapping[str, int] | None = None
    ) -> Passed:
        """One pass over all rows.

        Args:
            merged: the model's weights hold the auxiliaries (`Merging`), so that the pass adds nothing.
            learnt: as for `CustomerRows.weighed`.

        Raises:
            GradientLearningError: an unknown customer, or a site that no gradient came to.
            SiteError: an auxiliary has a site that is not among `sites`.
        """
        rows = rows.to(self.model.device)
        labels, shares = rows.weighed(learnt)
        with Taps(self.model, self._tapped(mode), mode, self._device, merged) as taps:
            with torch.enable_grad(), taps.batch(rows.customers, rows.mask) as batch:
                hidden = body_output(self.model, rows.input_ids, rows.position_ids)
                loss, each = self.head(hidden, labels, shares_BT=shares)
                loss.backward()
            pairs = batch.pairs()
        return Passed(pairs, *_told(rows.customers, each.double().sum(dim=1), (labels != IGNORED).sum(dim=1)))

    @torch.no_grad()
    def losses(self, rows: CustomerRows, mode: Mode, merged: bool = False) -> tuple[dict[str, float], dict[str, int]]:
        """Each customer's mean cross-entropy and the labels that it is of, without gradients."""
        rows = rows.to(self.model.device)
        labels, shares = rows.weighed()
        with Taps(self.model, self._tapped(mode), mode, merged=merged) as taps, taps.batch(rows.customers, rows.mask):
            hidden = body_output(self.model, rows.input_ids, rows.position_ids)
            _, each = self.head(hidden, labels, shares_BT=shares)
        return _told(rows.customers, each.double().sum(dim=1), (labels != IGNORED).sum(dim=1))

    def _tapped(self, mode: Mode) -> dict[str, Site]:
        """The sites of the mode's auxiliaries; others cost nothing."""
        used = {name for auxiliary in mode.auxiliaries.values() for name in auxiliary.sites}
        return {name: site for name, site in self.sites.items() if name in used}


def _told(customers: Sequence[str | None], sums: Tensor, counts: Tensor) -> tuple[dict[str, float], dict[str, int]]:
    totals: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for customer, nll, count in zip(customers, sums.tolist(), counts.tolist(), strict=True):
        if customer is not None:
            totals[customer] = totals.get(customer, 0.0) + nll
            tokens[customer] = tokens.get(customer, 0) + int(count)
    return {name: totals[name] / max(1, tokens[name]) for name in totals}, tokens
