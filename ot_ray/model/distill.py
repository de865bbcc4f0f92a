"""Teacher and student in one forward pass of the model itself, and the losses between them.

The layer list holds [A1 · M · E · A2]; the lanes below lead the hidden states through M without
gradients, then through E from the same start. Optimisers and loops are in training.

Letters: B batch, T positions, D hidden width, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.errors import SplitError
from ot_ray.model.families import family_of, first_of, layers_of, set_layers
from ot_ray.model.isolation import isolated_documents
from ot_ray.model.split import SplitPlan, depth_of, with_layers


class DistillLoss(Config):
    """Weights of the distillation objective, ``lm_weight * CE + kd_weight * KD`` (the paper's section 3.3)."""

    lm_weight: float = 1.0
    """Weight of next-token cross-entropy of the emulated model."""
    kd_weight: float = 30.0
    """Weight of the normalised squared error on the middle's output."""


def normalized_mse(
    student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, real_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """``mean(((T - S) / rms(T))^2)`` over real positions, rms over the same positions (the authors' loss,
    with padding left out).

    Args:
        student_BTD, teacher_BTD: outputs of the emulator and of the middle.
        real_BT: True where a token is not padding; ``None`` takes every position.

    Returns:
        A scalar in float32; 0 where no position is real.
    """
    student, teacher = student_BTD.float(), teacher_BTD.float()
    if real_BT is None:
        return (student - teacher).pow(2).mean() / teacher.pow(2).mean()
    weight = real_BT.unsqueeze(-1).to(torch.float32)
    # The means share their count, so it cancels and only the sums are needed.
    error = ((student - teacher).pow(2) * weight).sum()
    power = (teacher.pow(2) * weight).sum()
    return error / power.clamp_min(torch.finfo(torch.float32).tiny)


class _Lanes:
    """What the first layer of M was given, and what M made of it, within one forward pass."""

    def __init__(self) -> None:
        self.start: torch.Tensor | None = None
        self.teacher: torch.Tensor | None = None
        self.student: torch.Tensor | None = None


class _LaneLayer(nn.Module):
    """A layer of the list that knows whether it is the first or the last of its lane."""

    def __init__(self, layer: nn.Module, lanes: _Lanes, first: bool, last: bool) -> None:
        super().__init__()
        self.layer, self._lanes, self._first, self._last = layer, lanes, first, last


class _TeacherLayer(_LaneLayer):
    """One layer of M, run without gradients on the hidden states as the layer list passes them on."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._first:
            self._lanes.start = hidden_states
        with torch.no_grad():
            output = self.layer(hidden_states, *args, **kwargs)
        if self._last:
            self._lanes.teacher = first_of(output)
        return output


class _StudentLayer(_LaneLayer):
    """One layer of E; the first starts again from what M was given, the last keeps its output."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._first:
            assert self._lanes.start is not None, "the teacher's lane runs before the student's"
            hidden_states = self._lanes.start
        output = self.layer(hidden_states, *args, **kwargs)
        if self._last:
            self._lanes.student = first_of(output)
        return output


class DistillModel(nn.Module):
    """A causal language model with the emulator beside its middle, trained in one forward pass.

    Each layer of M and of E is an entry of the model's own layer list, so it gets exactly the mask and
    position embeddings that the architecture gives a layer of its type (Gemma 2 alternates them). Only E
    has gradients.

    Args:
        model: the full model; it is taken over and changed (its tensors become the teacher's).
        plan: the split.
        kept: the layers of the middle that E starts from; E gets copies of them.
    """

    def __init__(self, model: PreTrainedModel, plan: SplitPlan, kept: Sequence[int], weights: DistillLoss) -> None:
        super().__init__()
        if len(kept) != plan.keep:
            raise SplitError(f"kept is {list(kept)}; name split.keep = {plan.keep} layers of the middle")
        depth = depth_of(model)
        middle = plan.middle(depth)
        positions = [*range(middle.stop), *(middle[i] for i in kept), *range(middle.stop, depth)]
        self.plan, self.weights = plan, weights
        self.model = with_layers(model, positions, share=True)
        self._lanes = _Lanes()
        self._install(middle)

    def _install(self, middle: range) -> None:
        layers = layers_of(self.model)
        keep = self.plan.keep
        for i in middle:
            layers[i] = _TeacherLayer(layers[i], self._lanes, i == middle.start, i == middle.stop - 1)
        self.model.requires_grad_(False)
        for i in range(middle.stop, middle.stop + keep):
            student = _unshared(layers[i])
            student.requires_grad_(True)
            layers[i] = _StudentLayer(student, self._lanes, i == middle.stop, i == middle.stop + keep - 1)
        set_layers(self.model, layers)
        self._students = range(middle.stop, middle.stop + keep)

    def train(self, mode: bool = True) -> DistillModel:
        """Dropout and the like for E alone: what the teacher says must not be noise."""
        super().train(mode)
        self.model.eval()
        for i in self._students:
            layers_of(self.model)[i].train(mode)
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One pass of teacher and student.

        Args:
            input_ids, labels, position_ids: int64 [B, T], as the packer makes them; labels are not shifted.
            real: bool [B, T], False on padding.

        Returns:
            Float32 scalars: `loss`, the weighted sum that is minimised, and its parts `lm_loss` and `kd_loss`.
        """
        with isolated_documents(self.model):
            output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        lanes = self._lanes
        assert lanes.student is not None and lanes.teacher is not None
        kd_loss = normalized_mse(lanes.student, lanes.teacher, real)
        lm_loss = next_token_loss(output.logits, labels)
        lanes.start = lanes.teacher = lanes.student = None
        loss = self.weights.lm_weight * lm_loss + self.weights.kd_weight * kd_loss
        return {"loss": loss, "lm_loss": lm_loss.detach(), "kd_loss": kd_loss.detach()}

    def emulator_state(self, trained: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of E, named ``<layer of E>.<name>``.

        Args:
            trained: this module's trainable parameters by their names in it, where an engine holds them
                elsewhere; unset, the module's own.
        """
        tensors = trained if trained is not None else dict(self.named_parameters())
        path = f"model.{family_of(self.model).layers}"
        return {
            f"{place}.{name[len(prefix) :]}": tensor.detach()
            for place, i in enumerate(self._students)
            for prefix in [f"{path}.{i}.layer."]
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }


def next_token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of predicting each label from the position before it; labels of -100 don't count.

    Returns:
        A float32 scalar; 0 (with a gradient of 0) where nothing is to be predicted.
    """
    targets = labels_BT[:, 1:]
    wanted = targets != -100
    # Only positions that are learnt are lifted to float32: the whole [B, T, V] never is.
    logits = logits_BTV[:, :-1][wanted].float()
    if logits.shape[0] == 0:
        return logits_BTV.float().sum() * 0.0
    return F.cross_entropy(logits, targets[wanted])


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
