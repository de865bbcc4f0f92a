"""The losses of distilling and tuning: cross-entropy without a whole [B, T, V] of logits, and the distance
between two lanes. Both are means over rows, so they do not depend on how a batch is divided.

Letters: B rows, T positions, N positions that are learnt, D hidden width, V vocabulary."""

from __future__ import annotations

from typing import Any

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
        tokens: positions whose logits exist at once, where the head is frozen.
    """

    def __init__(self, model: PreTrainedModel, tokens: int = HEAD_TOKENS) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "every family of the table has a linear head"
        self.weight, self.bias = head.weight, head.bias
        cap = family_of(model).logits_cap
        self._cap: float | None = getattr(model.config, cap) if cap else None
        self._tokens = tokens

    def forward(self, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, *, summed: bool = False) -> torch.Tensor:
        """Cross-entropy of predicting each label from the position before it.

        Args:
            hidden_BTD: what the model's body returns, after its final norm.
            labels_BT: int64, not shifted; -100 is not learnt.
            summed: the sum over all learnt positions instead.

        Returns:
            The mean over rows of each row's mean, a float32 scalar; a row with nothing to learn counts 0.
        """
        targets = labels_BT[:, 1:]
        wanted = targets != IGNORED
        shares = wanted.float()
        if not summed:
            shares = shares / wanted.sum(1, keepdim=True).clamp_min(1) / labels_BT.shape[0]
        hidden_ND, targets_N, shares_N = hidden_BTD[:, :-1][wanted], targets[wanted], shares[wanted]
        if torch.is_grad_enabled() and (self.weight.requires_grad or _learns(self.bias)):
            logits = _capped(F.linear(hidden_ND, self.weight, self.bias).float(), self._cap)
            return (F.cross_entropy(logits, targets_N, reduction="none") * shares_N).sum()
        learns = torch.is_grad_enabled() and hidden_ND.requires_grad
        return _FrozenCrossEntropy.apply(
            hidden_ND, self.weight, self.bias, targets_N, shares_N, self._cap, self._tokens, learns
        )


class _FrozenCrossEntropy(torch.autograd.Function):
    """The sum of ``share * CE``, some positions at a time. As the head is frozen, the gradient by the hidden
    states is all that backward needs, so forward takes it while a chunk's logits are there."""

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
    ) -> torch.Tensor:
        device = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
        weight_VD = weight_VD.to(dtype)
        bias_V = bias_V.to(dtype) if bias_V is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if learns else None
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden_ND.shape[0], tokens):
                part = slice(start, start + tokens)
                hidden, targets, shares = hidden_ND[part].to(dtype), targets_N[part, None], shares_N[part]
                logits = F.linear(hidden, weight_VD, bias_V)
                slope = _slope(logits, cap) if learns else None
                logs = torch.log_softmax(_capped(logits, cap), dim=-1, dtype=torch.float32)
                del logits
                total -= (logs.gather(1, targets).squeeze(1) * shares).sum()
                if gradient_ND is not None:
                    by_logits = _minus_one(logs.exp_(), targets)
                    by_logits = by_logits.mul_(slope) if slope is not None else by_logits
                    gradient_ND[part] = (by_logits.to(dtype) @ weight_VD).mul_(shares[:, None])
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (gradient_ND,) = ctx.saved_tensors
        return ((gradient_ND * by_total).to(gradient_ND.dtype), *[None] * 7)


def _learns(parameter: torch.Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _slope(logits: torch.Tensor, cap: float | None) -> torch.Tensor | None:
    return None if cap is None else 1 - torch.tanh(logits.float() / cap).pow_(2)


def _minus_one(shares: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Softmax to the gradient of cross-entropy by the logits, in place."""
    return shares.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=shares.dtype))
