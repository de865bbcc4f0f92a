"""Nested states (an optimiser's, a fitter's) as a flat table of tensors and a JSON text, and back: what safetensors
holds, and nothing that would have to be unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ot_ray.errors import GradientLearningError

_TENSOR, _ITEMS = "tensor", "items"


def pack_state(state: Any) -> tuple[dict[str, Tensor], str]:
    """Take a state apart.

    Args:
        state: tensors, numbers, text, None, and lists, tuples and mappings of them.

    Returns:
        Tensors by number (`0`, `1`, ...), and the rest as JSON.

    Raises:
        GradientLearningError: it holds anything else.
    """
    tensors: dict[str, Tensor] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().contiguous()
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            # A pair each, since JSON would make text of an optimiser's numbers.
            return {_ITEMS: [[packed(key), packed(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [packed(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise GradientLearningError(f"a state holds a {type(value).__name__}, which no file of ours can hold")

    return tensors, json.dumps(packed(state))


def unpack_state(tensors: Mapping[str, Tensor], text: str) -> Any:
    """Put a state together again; tuples come back as lists.

    Raises:
        GradientLearningError: the two do not belong together, or are none of `pack_state`'s.
    """

    def unpacked(value: Any) -> Any:
        if isinstance(value, list):
            return [unpacked(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if value.keys() != {_ITEMS} or any(isinstance(key, dict) for key, _ in value[_ITEMS]):
            raise ValueError(f"an object of {', '.join(value) or 'nothing'}")
        return {unpacked(key): unpacked(item) for key, item in value[_ITEMS]}

    try:
        return unpacked(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GradientLearningError(f"this is no state that was packed here: {error!r}") from None
