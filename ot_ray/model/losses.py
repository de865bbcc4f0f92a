"""The losses of distilling and tuning: cross-entropy without a whole [B, T, V] of logits, and the distance
between two lanes. Both are means over rows, so they do not depend on how a batch is divided.

Letters: B rows, T positions, N positions that are learnt, D hidden width, V vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from ot_ray.config import Config
from ot_ray.model.families import family_of

HEAD_TOKENS = 1024
"""Positions whose logits exist at once, unless said otherwise."""
IGNORED = -100
"""The label of a position that is not learnt."""


class DistillLoss(Config):
    """Weights of the distillation objective, ``lm_weight * CE + kd_weight * KD`` (the paper's section 3.3)."""

    lm_weight: float = 1.0
    """Weight of next-token cross-entropy of the emulated model."""
    kd_weight: float = 30.0
    """Weight of the normalised squared error on the middle's output."""


def normalized_mse(
    student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, real_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """``mean(((T - S) / rms(T))^2)`` of each row over its real positions, rms over the same positions (the
    authors' loss, with padding left out and each row on its own).

    Args:
        student_BTD, teacher_BTD: outputs of the emulator and of the middle.
        real_BT: True where a token is not padding; ``None`` takes every position.

    Returns:
        The mean over rows, a scalar in float32; a row without a real position counts 0.
    """
    student, teacher = student_BTD.float(), teacher_BTD.float()
    errors, powers = (student - teacher).pow(2).sum(-1), teacher.pow(2).sum(-1)
    if real_BT is not None:
        # Not a product with the mask: what stands on padding may be infinite.
        errors, powers = errors.where(real_BT, 0.0), powers.where(real_BT, 0.0)
    # The means share their count, so it cancels and only the sums are needed.
    return (errors.sum(-1) / powers.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


class LanguageHead(nn.Module):
    """The head of a language model and its cross-entropy as one module.

    It shares the parameters of the model's own head. Logits and their gradient live inside `forward`, which
    is where a sharded weight is whole.

    Args:
        tokens: positions whose logits exist at once, learning or not.
    """

    def __init__(self, model: PreTrainedModel, tokens: int = HEAD_TOKENS) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "every family of the table has a linear head"
        self.weight, self.bias = head.weight, head.bias
        cap = family_of(model).logits_cap
        self._cap: float | None = getattr(model.config, cap) if cap else None
        self._tokens = tokens

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        labels_BT: torch.Tensor,
        *,
        summed: bool = False,
        accuracy: bool = False,
        shares_BT: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of predicting each label from the position before it.

        Args:
            hidden_BTD: what the model's body returns, after its final norm.
            labels_BT: int64, not shifted; -100 is not learnt.
            summed: the sum over all learnt positions instead.
            accuracy: return a second scalar beside it: how often the likeliest token is the label, counted just as
                the loss is (summed: how many are).
            shares_BT: float32, what each label's cross-entropy is multiplied by in a sum over all; the first column
                is not read. A second result beside the sum is then the cross-entropy of each label as it is, float32
                [B, T], without gradient, 0 where nothing is learnt.

        Returns:
            The mean over rows of each row's mean, a float32 scalar; a row with nothing to learn counts 0.
        """
        targets = labels_BT[:, 1:]
        wanted = targets != IGNORED
        shares = wanted.float() if shares_BT is None else shares_BT[:, 1:]
        if not summed and shares_BT is None:
            shares = shares / wanted.sum(1, keepdim=True).clamp_min(1) / labels_BT.shape[0]
        hidden_ND, targets_N, shares_N = hidden_BTD[:, :-1][wanted], targets[wanted], shares[wanted]
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_ND, *parameters))
        loss, right, each_N = _ChunkedCrossEntropy.apply(
            hidden_ND, self.weight, self.bias, targets_N, shares_N, self._cap, self._tokens, learns, accuracy
        )
        if shares_BT is not None:
            each_BT = torch.zeros(labels_BT.shape, dtype=torch.float32, device=loss.device)
            each_BT[:, 1:][wanted] = each_N
            return loss, each_BT
        return (loss, right) if accuracy else loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of ``share * CE``, some positions at a time. Nothing follows the sum but a factor, so forward takes
    the gradients by the hidden states and by what learns of the head while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        shares_N: torch.Tensor,
        cap: float | None,
        tokens: int,
        learns: bool,
        accuracy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        head = _Head(weight_VD.to(dtype), bias_V.to(dtype) if bias_V is not None else None, cap)
        wanted = [
            learns and tensor is not None and needed
            for tensor, needed in zip((hidden_ND, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        ]
        by_hidden = torch.empty_like(hidden_ND) if wanted[0] else None
        by_weight = by_bias = None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        right, each = torch.zeros_like(total), torch.zeros_like(shares_N)
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden_ND.shape[0], tokens):
                part = slice(start, start + tokens)
                hidden, shares = hidden_ND[part].to(dtype), shares_N[part]
                each[part], hits, by_logits = head.loss(hidden, targets_N[part, None], shares, learns, accuracy)
                total += (each[part] * shares).sum()
                right += hits
                if by_hidden is not None and by_logits is not None:
                    by_hidden[part] = by_logits @ head.weight
                if wanted[1] and by_logits is not None:
                    by_weight = _plus(by_weight, by_logits.T @ hidden, weight_VD.dtype)
                if wanted[2] and by_logits is not None:
                    by_bias = _plus(by_bias, by_logits.sum(0), weight_VD.dtype)
        if hidden_ND.shape[0] == 0:
            by_weight = torch.zeros_like(weight_VD) if wanted[1] else None
            by_bias = torch.zeros_like(bias_V) if wanted[2] and bias_V is not None else None
        # Not saved as tensors of the graph: backward scales them where they are, as a copy of the head would be large.
        ctx.gradients = by_hidden, by_weight, by_bias
        ctx.mark_non_differentiable(right, each)
        return total, right, each

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, by_total: torch.Tensor, by_right: torch.Tensor, by_each: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the graph of this loss has been walked before"
        return (*(g if g is None else g.mul_(by_total) for g in gradients), *[None] * 6)


def _plus(total: torch.Tensor | None, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum in `dtype`; the first part starts it, because filling a head's gradient with zeros is a pass over it."""
    return part.to(dtype) if total is None else total.add_(part)


class _Head(NamedTuple):
    """The head in the type of its products."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    cap: float | None

    def loss(
        self, hidden_CD: torch.Tensor, targets_C1: torch.Tensor, shares_C: torch.Tensor, learns: bool, accuracy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | None]:
        """The cross-entropy of each label of one chunk, the weighted number of labels that are likeliest (0 unless
        asked for), and the gradient of the weighted sum by the logits, [C, V] in the products' type."""
        logits = F.linear(hidden_CD, self.weight, self.bias)
        # A cap keeps the order, so that the likeliest is so without it.
        hits = (shares_C * (logits.argmax(-1) == targets_C1.squeeze(1))).sum() if accuracy else 0.0
        slope = _slope(logits, self.cap) if learns else None
        logs = torch.log_softmax(_capped(logits, self.cap), dim=-1, dtype=torch.float32)
        del logits
        each = -logs.gather(1, targets_C1).squeeze(1)
        if not learns:
            return each, hits, None
        by_logits = _minus_one(logs.exp_(), targets_C1)
        by_logits = by_logits.mul_(slope) if slope is not None else by_logits
        return each, hits, by_logits.mul_(shares_C[:, None]).to(hidden_CD.dtype)


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _slope(logits: torch.Tensor, cap: float | None) -> torch.Tensor | None:
    return None if cap is None else 1 - torch.tanh(logits.float() / cap).pow_(2)


def _minus_one(shares: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Softmax to the gradient of cross-entropy by the logits, in place."""
    return shares.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=shares.dtype))
