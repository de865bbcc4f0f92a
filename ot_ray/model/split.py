"""Splitting a model into adapter, middle and adapter, standing an emulator in for the middle, and
plugging a tuned adapter back in. Models made here share tensors with their source unless said otherwise.

Which middle layers an emulator keeps is decided in emulator.py; files are written in artifacts."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.errors import SplitError
from ot_ray.model.bottleneck import CHILD, bottleneck_places, insert_bottleneck
from ot_ray.model.families import family_of, head_of, layer_config, layers_of, per_layer_lists, renumber, set_layers
from ot_ray.model.head import HEAD, put_head

_LAYER_KEY = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(.+)")


class SplitPlan(Config):
    """How a model is cut: `bottom` adapter layers, `keep` emulator layers, `top` adapter layers.

    Written `2-8-2` in the paper (section 4.1) and in reports.
    """

    bottom: int = Field(default=2, ge=0)
    """Adapter layers next to the input."""
    keep: int = Field(ge=1)
    """Layers of the emulator, k; from 1 to the number of middle layers M."""
    top: int = Field(default=2, ge=0)
    """Adapter layers next to the output."""

    @model_validator(mode="after")
    def _has_adapter(self) -> SplitPlan:
        if self.bottom + self.top == 0:
            raise ValueError("bottom and top are both 0, so nothing could be tuned; set at least one to 1 or more")
        return self

    def __str__(self) -> str:
        return f"{self.bottom}-{self.keep}-{self.top}"

    @property
    def depth(self) -> int:
        """Layers of the emulated model."""
        return self.bottom + self.keep + self.top

    def middle(self, depth: int) -> range:
        """Positions of the middle in a model of `depth` layers.

        Raises:
            SplitError: the adapters leave fewer layers between them than `keep`.
        """
        size = depth - self.bottom - self.top
        if size < 1:
            raise SplitError(
                f"split.bottom + split.top is {self.bottom + self.top}, but the model has {depth} layers; "
                f"use at most {depth - 1}"
            )
        if self.keep > size:
            raise SplitError(
                f"split.keep is {self.keep}, but only {size} layers lie between the adapters; use 1..{size}"
            )
        return range(self.bottom, depth - self.top)

    def adapter_positions(self, depth: int) -> list[int]:
        """Positions of the adapter layers in a model of `depth` layers, ascending."""
        return [*range(self.bottom), *range(depth - self.top, depth)]


def depth_of(model: PreTrainedModel) -> int:
    """Number of transformer layers."""
    return len(layers_of(model))


def emulate(model: PreTrainedModel, plan: SplitPlan, kept: Sequence[int], *, share: bool = False) -> PreTrainedModel:
    """Build the emulated model [A1 · E · A2], where E starts as layers taken from the middle.

    Args:
        model: the full model [A1 · M · A2]; it is left as it was.
        kept: which layers of the middle E consists of, counted from 0 at the first middle layer, ascending.
        share: share all tensors with `model` instead of copying them.

    Returns:
        A plain Transformers model of `plan.depth` layers whose `config` fits.

    Raises:
        SplitError: the plan does not fit the model, or `kept` is not `plan.keep` ascending places in the middle.
    """
    return with_layers(model, emulated_layers(depth_of(model), plan, kept), share=share)


def emulated_layers(depth: int, plan: SplitPlan, kept: Sequence[int]) -> list[int]:
    """Which layers of a full model of `depth` layers make up [A1 · E · A2], in that order.

    Raises:
        SplitError: the plan does not fit the model, or `kept` is not `plan.keep` ascending places in the middle.
    """
    middle = plan.middle(depth)
    if len(kept) != plan.keep or list(kept) != sorted(set(kept)) or not set(kept) <= set(range(len(middle))):
        raise SplitError(f"kept is {list(kept)}; name {plan.keep} different layers of 0..{len(middle) - 1}, ascending")
    adapter = plan.adapter_positions(depth)
    return [*adapter[: plan.bottom], *(middle[i] for i in kept), *adapter[plan.bottom :]]


def with_layers(model: PreTrainedModel, positions: Sequence[int], *, share: bool) -> PreTrainedModel:
    """Copy a model with only the layers at `positions`, in that order; a position may stand there twice."""
    source = layers_of(model)
    memo: dict[int, object] = _shared(model) if share else {}
    # An empty list stands for the layers in the copy, so that those which are left out are never copied.
    memo[id(source)] = nn.ModuleList()
    clone = copy.deepcopy(model, memo)
    layers = [copy.deepcopy(source[i], _shared(source[i]) if share else None) for i in positions]
    set_layers(clone, nn.ModuleList(layers))
    _fit_config(clone, positions)
    renumber(layers_of(clone))
    return clone


def _fit_config(model: PreTrainedModel, positions: Sequence[int]) -> None:
    config = layer_config(model.config)
    for name in list(per_layer_lists(config)):
        values = getattr(config, name)
        setattr(config, name, [values[i] for i in positions])
    config.num_hidden_layers = len(positions)


def _shared(module: nn.Module) -> dict[int, object]:
    """A memo for `copy.deepcopy` that makes the copy hold the very same tensors."""
    return {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}


def adapter_state(model: PreTrainedModel, plan: SplitPlan) -> dict[str, torch.Tensor]:
    """Tensors of the adapter layers, named by *bundle position*: ``layers.<i>.<name>``; in an image model those of
    the classification head as well: ``head.<name>``.

    The names are the same whether `model` is the full or the emulated model, because the top layers
    are counted in the emulated model's depth.
    """
    layers, head = layers_of(model), head_of(model)
    positions = plan.adapter_positions(len(layers))
    state = {
        f"layers.{bundle}.{name}": tensor
        for bundle, full in zip(plan.adapter_positions(plan.depth), positions, strict=True)
        for name, tensor in layers[full].state_dict().items()
    }
    if head is not None:
        state |= {f"{HEAD}.{name}": tensor for name, tensor in head.state_dict().items()}
    return state


def plug_in(
    model: PreTrainedModel,
    plan: SplitPlan,
    state: Mapping[str, torch.Tensor],
    classes: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Put a tuned adapter A1' + A2' into the full model: the plug-in model [A1' · M · A2'].

    The result shares every tensor outside the adapter with `model`, so a plug-in model costs the
    adapter's bytes. `model` is left as it was. One with bottlenecks in it is kept as its adapter: Transformers leaves
    them out when it opens a checkpoint.

    Args:
        model: the full model.
        state: tensors named as `adapter_state` names them, of the same shapes; cast to the model's dtype. Where
            there are tensors of a bottleneck among them, a bottleneck of their size is put in. The head of an image
            model may have another number of classes.
        classes: names of an image model's classes, in the order of the head's rows; unset, they stay, or are
            numbered where their number changes.

    Raises:
        SplitError: a tensor is missing, unknown or of another shape, or `classes` are not as many as the head's rows.
    """
    positions = plan.adapter_positions(depth_of(model))
    full_position = dict(zip(plan.adapter_positions(plan.depth), positions, strict=True))
    clone = with_layers(model, range(depth_of(model)), share=True)
    layers = layers_of(clone)
    for bundle, full in full_position.items():
        _make_bottlenecks(clone, layers[full], f"layers.{bundle}", state)
    _make_head(clone, state, classes)
    expected = adapter_state(clone, plan)
    _check_state(expected, state)
    for key, tensor in state.items():
        match, head = _LAYER_KEY.fullmatch(key), head_of(clone)
        place, name = (layers[full_position[int(match[1])]], match[2]) if match else (head, key.partition(".")[2])
        assert place is not None
        _replace(place, name, tensor.detach().to(expected[key]).clone())
    return clone


def _make_head(model: PreTrainedModel, state: Mapping[str, torch.Tensor], classes: Sequence[str] | None) -> None:
    """Put in a head of as many classes as the state has; a state without a sound one is refused afterwards."""
    head, weight = head_of(model), state.get(f"{HEAD}.weight")
    count = weight.shape[0] if weight is not None and weight.dim() == 2 else 0
    if classes is not None and len(classes) != (count if head is not None else 0):
        raise SplitError(
            f"classes names {len(classes)}, but the adapter's head has {count} rows; pass the names that belong to it"
        )
    if head is not None and count and (classes is not None or count != head.out_features):
        put_head(model, count, classes)


def _make_bottlenecks(model: PreTrainedModel, layer: nn.Module, prefix: str, state: Mapping[str, torch.Tensor]) -> None:
    for place in bottleneck_places(family_of(model)):
        down = state.get(f"{prefix}.{place}.{CHILD}.down.weight")
        there = hasattr(layer.get_submodule(place), CHILD)
        if down is not None and down.dim() == 2 and not there:
            insert_bottleneck(model, layer, place, down.shape[0])


def _check_state(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    problems = [f"tensor {name} is missing" for name in _some(expected.keys() - state.keys())]
    problems += [f"tensor {name} is not part of the adapter" for name in _some(state.keys() - expected.keys())]
    problems += [
        f"tensor {name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise SplitError("the adapter does not fit the split: " + "; ".join(problems))


def _some(names: Iterable[str], most: int = 5) -> list[str]:
    return sorted(names)[:most]


def _replace(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = layer.get_submodule(parent_name)
    if leaf in parent._parameters:
        old = parent._parameters[leaf]
        requires_grad = old.requires_grad if old is not None else False
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        parent._buffers[leaf] = tensor


def freeze_all_but_adapter(model: PreTrainedModel, plan: SplitPlan) -> None:
    """Leave gradients on for the adapter layers, and for the classification head of an image model (embeddings, norm,
    a language model's head and the emulator are frozen)."""
    model.requires_grad_(False)
    layers, head = layers_of(model), head_of(model)
    for position in plan.adapter_positions(len(layers)):
        layers[position].requires_grad_(True)
    if head is not None:
        head.requires_grad_(True)
