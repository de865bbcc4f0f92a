"""Taps on the sites of a frozen base model: auxiliaries' outputs go in, pairs (x, g) come out.

Whose rows go where is in modes.py, what becomes of the pairs in fitting.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ot_ray.cola.modes import Mode
from ot_ray.cola.pairs import Batch
from ot_ray.cola.sites import Site
from ot_ray.errors import GradientLearningError, SiteError


class Taps:
    """While open: the model's passes use the auxiliaries, and backward passes yield pairs at the sites.

    All parameters of the model are frozen while it is open, and as they were afterwards. The auxiliaries' tensors are
    constants of the server's graph, whose one leaf is a scalar of this class's own; a site keeps its x until the
    backward pass comes there, which is where x and g are captured. Gradient checkpointing keeps no x and works with
    the same result; its `use_reentrant=True` does where the first of its inputs has a gradient.
    Auxiliaries are read on both ways, and copied for neither; one that is fitted in between is refused.

    Rows do not see each other in any sound base model but those with batch norm in training mode, which are refused
    where there are several customers. Dropout draws for the whole batch, so that customers' rows are what they would
    be alone only without it. Layers that `torch.compile` took over are not supported.

    Args:
        sites: of this model, as `find_sites` gives them; every auxiliary's sites must be among them.
        device: where pairs are to be fitted; unset, they stay where they arise. From a GPU to the CPU they travel
            while the backward pass goes on.
        merged: the weights hold what the auxiliaries say (`merging.py`), so that passes add nothing.

    Raises:
        SiteError: a site is not one of the model's, or an auxiliary has a site that is not tapped.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        mode: Mode,
        device: torch.device | str | None = None,
        merged: bool = False,
    ) -> None:
        self._model, self._sites, self._mode, self._merged = model, dict(sites), mode, merged
        self._device = None if device is None else torch.device(device)
        self._modules = {name: _module(model, name) for name in self._sites}
        for customer, auxiliary in mode.auxiliaries.items():
            for name, site in auxiliary.sites.items():
                # The same object mostly; comparing many customers' field by field would take as long as their products.
                if (own := self._sites.get(name)) is not site and own != site:
                    raise SiteError(f"the auxiliary of {customer!r} has site {name}, which is not tapped; tap it too")
        if merged:
            mode.summands()
        self._batch_norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        self._batch: Batch | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []

    def __enter__(self) -> Taps:
        if self._handles:
            raise GradientLearningError("these taps are open already; close them, or make others")
        self._frozen = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._handles = [
            module.register_forward_hook(partial(self._called, name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._frozen, self._batch = [], [], None

    @contextmanager
    def batch(self, rows: Sequence[str | None] | None = None, mask: Tensor | None = None) -> Iterator[Batch]:
        """Say whose rows the passes inside have; their backward passes belong inside, too.

        Args:
            rows: the customer of each of the B rows; None for the base model's own, which nobody fits. Mode joint does
                without.
            mask: bool or integer [B, T], false at padding, which no auxiliary is fitted to; unset, nothing is padding.
                The loss must neither learn from padding nor learn it (`customers_loss` with the same mask does
                neither): on the left of a row, the last of it predicts the first token; on the right, the last token
                predicts it. Convolutions see whole rows.

        Raises:
            GradientLearningError: an unknown customer; rows that are needed, but missing; a batch norm in training
                mode, where there are several customers.
        """
        if not self._handles or self._batch is not None:
            raise GradientLearningError("a batch is opened in open taps, one at a time; use `with Taps(...) as taps`")
        training = [name for name in self._batch_norms if self._model.get_submodule(name).training]
        if training and len(self._mode.auxiliaries) > 1:
            raise GradientLearningError(
                f"{training[0]} is a batch norm in training mode, through which customers' rows would change each "
                "other; put it in evaluation mode"
            )
        self._batch = Batch(self._mode, self._sites, rows, mask, self._device)
        try:
            yield self._batch
        finally:
            self._batch = None

    def _called(self, site: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        batch = self._batch
        if batch is None and self._mode.needs_rows and not self._merged:
            raise GradientLearningError("a pass ran outside a batch; wrap it in `with taps.batch(rows=...)`")
        if batch is not None:
            batch.check(site, x)
        if not self._merged:
            delta = self._mode.delta(site, x, None if batch is None else batch.sums(x.device))
            if delta is not None:
                output = output + delta.reshape(output.shape).to(output.dtype)
        if batch is None or not torch.is_grad_enabled():
            return output
        return _Tap.apply(output, x, self._anchor, batch, site)


class _Tap(torch.autograd.Function):
    """Nothing on the way there; on the way back it hands (x, g) to the batch.

    x is a saved tensor, so that checkpointing drops it and makes it anew, and whoever overwrites it is found out.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, batch: Batch, site: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.batch, ctx.site = batch, site
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.batch.add(ctx.site, *ctx.saved_tensors, grads[0])
        return grads[0], None, None, None, None


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SiteError(f"the model has no module {name}; find its sites with find_sites(model, ...)") from None
