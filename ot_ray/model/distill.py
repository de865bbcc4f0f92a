"""Teacher and student in one forward pass of the model itself: what every family shares, and language models.

The lanes through the layer list are in lanes.py, the losses in losses.py, image models in images.py; optimisers and
loops in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.errors import SplitError
from ot_ray.model.emulator import EmulatorConfig, copy_state
from ot_ray.model.families import check_maps_are_called, family_of, layers_of, set_layers
from ot_ray.model.isolation import isolated_documents
from ot_ray.model.lanes import AdapterLayer, LaneLayer, Lanes, Setting, StudentLayer, TeacherLayer
from ot_ray.model.losses import HEAD_TOKENS, IGNORED, DistillLoss, LanguageHead, normalized_mse
from ot_ray.model.packed import LearningLinear, learn_compressed, prune, with_smaller_maps
from ot_ray.model.split import SplitPlan, depth_of, with_layers


class DistillOptions(Config):
    """How the pass is computed; the losses stay what they are."""

    checkpointing: bool = False
    """Compute the activations of E and A2 again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile each layer with `torch.compile`; pays where thousands of steps of one shape follow."""
    head_tokens: int = Field(default=HEAD_TOKENS, ge=1)
    """Positions whose logits exist at once; each takes about ten bytes an entry of the vocabulary."""


L = TypeVar("L", bound="LaneModel")


class LaneModel(nn.Module):
    """A model with the emulator beside its middle, trained in one forward pass.

    Each layer of M and of E is an entry of the model's own layer list, so it gets exactly the mask and
    position embeddings that the architecture gives a layer of its type (Gemma 2 alternates them). Only E
    has gradients.

    Args:
        model: the full model; it is taken over and changed (its tensors become the teacher's). Its
            parameters may be on the meta device, to be filled afterwards as `origins` says.
        plan: the split.
        kept: the layers of the middle that E starts from; E gets copies of them.
        middle_only: the loss is of the middle's output alone, so a pass of both lanes leaves A2 out.
        emulator: how E is compressed; it computes so from the first pass on.

    Raises:
        SplitError: the plan does not fit the model, or `kept` the plan.
        UnsupportedModelError: E is compressed, and the architecture is set up to pass by its linear maps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: SplitPlan,
        kept: Sequence[int],
        options: DistillOptions,
        middle_only: bool = False,
        emulator: EmulatorConfig | None = None,
    ) -> None:
        super().__init__()
        if len(kept) != plan.keep:
            raise SplitError(f"kept is {list(kept)}; name split.keep = {plan.keep} layers of the middle")
        depth = depth_of(model)
        middle = plan.middle(depth)
        self.plan = plan
        self._emulator = emulator or EmulatorConfig()
        if self._emulator.compressed:
            check_maps_are_called(model.config)
        self._sources = [*range(middle.stop), *(middle[i] for i in kept), *range(middle.stop, depth)]
        self._students = range(middle.stop, middle.stop + plan.keep)
        self.model = with_layers(model, self._sources, share=True)
        self._lanes = Lanes(family_of(model).returns_tuple, options.checkpointing, middle_only)
        self._install(middle)
        if options.compile:
            for layer in layers_of(self.model):
                layer.layer.compile(dynamic=False)  # type: ignore[union-attr,operator]

    def _install(self, middle: range) -> None:
        layers, students = layers_of(self.model), self._students
        self.model.requires_grad_(False)
        for i in range(len(layers)):
            layers[i] = self._lane_layer(layers[i], i, middle, students)
        set_layers(self.model, layers)

    def _lane_layer(self, layer: nn.Module, i: int, middle: range, students: range) -> LaneLayer:
        if i in middle:
            return TeacherLayer(layer, self._lanes, i == middle[0], i == middle[-1])
        if i in students:
            smaller = with_smaller_maps(_unshared(layer), family_of(self.model), self._emulator)
            student = learn_compressed(smaller, self._emulator).requires_grad_(True)
            return StudentLayer(student, self._lanes, i == students[0], i == students[-1])
        return AdapterLayer(layer, self._lanes, above=i >= students.stop)

    def train(self: L, mode: bool = True) -> L:
        """Dropout and the like for E alone: what the teacher says must not be noise."""
        super().train(mode)
        self.model.eval()
        for i in self._students:
            layers_of(self.model)[i].train(mode)
        return self

    def origins(self) -> dict[str, str]:
        """Where each tensor's start comes from.

        Returns:
            The name of every parameter and persistent buffer of this module -> its name in the full model's
            own state dict. E's tensors start as those of the layers that it keeps.
        """
        path = f"model.{family_of(self.model).layers}."
        return {name: self._origin(name, path) for name in _stored_names(self)}

    def _origin(self, name: str, path: str) -> str:
        if not name.startswith(path):
            return name.removeprefix("model.")
        place, _, rest = name.removeprefix(path).partition(".layer.")
        return f"{path.removeprefix('model.')}{self._sources[int(place)]}.{rest}"

    def start_of(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """What a tensor of this module starts as, given the whole tensor that `origins` names; pruned where E is."""
        return prune(stored, self._emulator.sparsity) if name in self.pruned else stored

    @cached_property
    def pruned(self) -> frozenset[str]:
        """Names of the weights that start pruned; each has to be seen whole to tell which of its entries stay."""
        if not self._emulator.sparsity:
            return frozenset()
        return frozenset(
            f"{name}.weight" for name, module in self.named_modules() if isinstance(module, LearningLinear)
        )

    def emulator_names(self) -> dict[str, str]:
        """``<layer of E>.<name>`` for the name of each parameter of E in this module."""
        path = f"model.{family_of(self.model).layers}"
        return {
            name: f"{place}.{name[len(prefix) :]}"
            for place, i in enumerate(self._students)
            for prefix in [f"{path}.{i}.layer."]
            for name, _ in self.named_parameters()
            if name.startswith(prefix)
        }

    def start_from(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put weights into E, in place: where its maps are smaller, the full model's layers have no weights for it.

        Args:
            state: as `emulator_names` names them.

        Raises:
            SplitError: a tensor is missing, unknown or of another shape.
        """
        parameters, names = dict(self.named_parameters()), {o: n for n, o in self.emulator_names().items()}
        copy_state(
            {ours: parameters[name] for ours, name in names.items()},
            state,
            "what the emulator starts from does not fit it",
            lambda ours, tensor: self.start_of(names[ours], tensor),
        )

    def emulator_state(self, trained: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of E, named as `emulator_names` says.

        Args:
            trained: this module's trainable parameters by their names in it, where an engine holds them
                elsewhere; unset, the module's own.
        """
        tensors = trained if trained is not None else dict(self.named_parameters())
        return {ours: tensors[name].detach() for name, ours in self.emulator_names().items()}


class DistillModel(LaneModel):
    """A causal language model whose emulator learns from the middle's output and from next tokens.

    Args:
        model, plan, kept, emulator: as for `LaneModel`.
        weights: of the two losses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: SplitPlan,
        kept: Sequence[int],
        weights: DistillLoss,
        options: DistillOptions | None = None,
        emulator: EmulatorConfig | None = None,
    ) -> None:
        options = options or DistillOptions()
        super().__init__(model, plan, kept, options, emulator=emulator)
        self.weights = weights
        # After the model, so that the parameters which both hold go by their names in the model.
        self.head = LanguageHead(self.model, options.head_tokens)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        setting: Setting | None = None,
    ) -> dict[str, torch.Tensor]:
        """One pass of teacher and student.

        Args:
            input_ids, labels, position_ids: int64 [B, T], as the packer makes them; labels are not shifted.
            real: bool [B, T], False on padding.
            setting: evaluate one lane alone, without gradients: the full or the emulated model.

        Returns:
            Float32 scalars, means over the B rows: `loss`, the weighted sum that is minimised, and its parts
            `lm_loss` and `kd_loss`. With a `setting`, `nll`, the summed cross-entropy in nats of the
            positions that are learnt, and `tokens`, how many those are.
        """
        self._lanes.begin(setting)
        try:
            if setting is not None:
                with torch.no_grad():
                    nll = self.head(self._hidden(input_ids, position_ids), labels, summed=True)
                return {"nll": nll, "tokens": (labels[:, 1:] != IGNORED).sum().float()}
            lm_loss = self.head(self._hidden(input_ids, position_ids), labels)
            assert self._lanes.student is not None and self._lanes.teacher is not None
            kd_loss = normalized_mse(self._lanes.student, self._lanes.teacher, real)
        finally:
            self._lanes.begin(None)
        loss = self.weights.lm_weight * lm_loss + self.weights.kd_weight * kd_loss
        return {"loss": loss, "lm_loss": lm_loss.detach(), "kd_loss": kd_loss.detach()}

    def _hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        return body_output(self.model, input_ids, position_ids)


def body_output(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Hidden states [B, T, D] after the final norm, packed documents kept apart; the head is not run."""
    body = model.base_model
    with isolated_documents(model, body):
        return body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


def _stored_names(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    for path, child in module.named_modules():
        kept = (name for name in child._buffers if name not in child._non_persistent_buffers_set)
        names += [f"{path}.{name}" if path else name for name in kept]
    return names


def _unshared(module: nn.Module) -> nn.Module:
    """Give a module whose tensors are shared its own copies of them."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach().clone())
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.clone()
    return module
