"""The classification head of an image model: whose classes it has, and putting another one in its place.

Letters: C classes, D hidden width. Returned heads are inspected in artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import PreTrainedConfig, PreTrainedModel

from ot_ray.errors import DataError, UnsupportedModelError
from ot_ray.model.families import IMAGE_FAMILIES, head_of

HEAD = "head"
"""What names of head tensors start with in an adapter's state."""
MOST_CHARACTERS = 256
"""Of a class's name."""
_STD = 0.02  # of a fresh head's weights, as vision transformers draw theirs


def is_head(name: str) -> bool:
    """Whether a name in an adapter's state is that of a tensor of the head."""
    return name.startswith(f"{HEAD}.")


def classes_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the classes, in the order of the logits.

    Raises:
        UnsupportedModelError: the model is no image classifier.
    """
    _head(model)
    return classes_in(model.config)


def classes_in(config: PreTrainedConfig) -> tuple[str, ...]:
    """Names of the classes that a configuration makes a model for, in the order of the logits."""
    # Transformers reads the keys as numbers, whatever it calls their type.
    names: Any = config.id2label or {}
    return tuple(str(names.get(i, f"LABEL_{i}")) for i in range(len(names)))


def prepare_head(model: PreTrainedModel, classes: Sequence[str], seed: int) -> None:
    """Give an image model a fresh head for other classes, in place, as a customer does before tuning.

    Args:
        classes: their names, in the order of the labels.
        seed: draws the weights, equal on every device.

    Raises:
        DataError: there are fewer than two classes, or two of one name.
        UnsupportedModelError: the model is no image classifier.
    """
    check_classes(classes)
    head = put_head(model, len(classes), classes)
    draw = torch.Generator().manual_seed(seed)
    weight = torch.empty(head.weight.shape, dtype=torch.float32).normal_(std=_STD, generator=draw)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()


def check_classes(classes: Sequence[str]) -> None:
    """Refuse names that no head can be made for.

    Raises:
        DataError: there are fewer than two classes, two of one name, or one of a name that adapters don't hold.
    """
    if len(classes) < 2:
        raise DataError(f"the classes are {list(classes)}; use images of at least two classes")
    twice = sorted(name for name, count in Counter(classes).items() if count > 1)
    if twice:
        raise DataError(f"classes {', '.join(map(repr, twice[:5]))} stand twice; give each class one name")
    unsound = [name for name in classes if not sound_class(name)]
    if unsound:
        raise DataError(
            f"class {unsound[0][:80]!r} and {len(unsound) - 1} more cannot be written down; use names of 1 to "
            f"{MOST_CHARACTERS} characters that are printed, without blanks at the ends"
        )


def sound_class(name: str) -> bool:
    """Whether a name of a class may stand in an adapter's manifest."""
    return 1 <= len(name) <= MOST_CHARACTERS and name.isprintable() and name == name.strip()


def put_head(model: PreTrainedModel, count: int, classes: Sequence[str] | None = None) -> nn.Linear:
    """Replace the head by one of `count` classes and whatever values memory holds, to be filled by the caller.

    Args:
        classes: their names; unset, `LABEL_0` and so on.

    Raises:
        UnsupportedModelError: the model is no image classifier.
    """
    old = _head(model)
    # No draw, so that filling a model from a file does not move the caller's random numbers.
    head = skip_init(nn.Linear, old.in_features, count, device=old.weight.device, dtype=old.weight.dtype)
    assert isinstance(head, nn.Linear)
    head.requires_grad_(old.weight.requires_grad).train(old.training)
    path = IMAGE_FAMILIES[model.config.model_type].head
    assert path is not None
    model.set_submodule(path, head)
    names = list(classes) if classes is not None else [f"LABEL_{i}" for i in range(count)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.num_labels = count  # type: ignore[assignment]
    return head


def _head(model: PreTrainedModel) -> nn.Linear:
    head = head_of(model)
    if head is None:
        raise UnsupportedModelError(
            f"model_type is {model.config.model_type!r}, which has no classes; use one of: {', '.join(IMAGE_FAMILIES)}"
        )
    return head
