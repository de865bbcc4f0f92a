"""Packed sequences without attention across documents, for every family.

Most architectures build a block-diagonal mask themselves from `position_ids` that restart at 0; for those
that ignore them (OPT, BLOOM) the mask is handed to each layer here. The packer is in data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from ot_ray.model.families import family_of, layers_of


@contextmanager
def isolated_documents(model: PreTrainedModel, called: nn.Module | None = None) -> Iterator[None]:
    """While open, `model(input_ids=..., position_ids=...)` keeps packed documents apart.

    Args:
        called: the module inside `model` that is called in its place, such as its body; unset, `model`.

    `position_ids`, int64 [B, T], restart at 0 where a document begins. A pass without them, or with a
    key-value cache (generation), is left as it is.
    """
    if family_of(model).positions_isolate:
        yield
        return
    masks = _Masks(model)
    handles = [(called or model).register_forward_pre_hook(masks.begin, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(masks.hand_over, with_kwargs=True) for layer in layers_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Masks:
    """The mask of the pass that is under way, made at its first layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config
        self._positions: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is True
        self._positions = None if cached else kwargs.get("position_ids")
        self._mask = None

    def hand_over(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._positions is None:
            return None
        if self._mask is None:
            hidden = args[0] if args else kwargs["hidden_states"]
            # The library's own function, so that the mask has the form this attention backend wants.
            self._mask = create_causal_mask(
                config=self._config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                position_ids=self._positions,
            )
        return args, {**kwargs, "attention_mask": self._mask}
