"""Passes of the base model over rows of many sessions, in which one that goes wrong goes wrong alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ot_ray.cola import BasePass, Mode, Pair
from ot_ray.errors import LaunchError, NotFiniteError
from serve.failures import ApiError
from serve.gradients.packing import Wanted, batch_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Yielded:
    """What a pass yielded for one operation."""

    loss: float
    """Mean cross-entropy of what was learnt, in nats."""
    tokens: int
    """How many tokens that is the mean of."""
    pairs: dict[str, Pair]
    """By site."""


def run_pass(
    base: BasePass, wanted: Sequence[Wanted], mode_of: Callable[[Sequence[Wanted]], Mode]
) -> dict[str, Yielded | Exception]:
    """Make one pass for all, or several smaller ones where that fails.

    Args:
        mode_of: through what the rows of some operations go, by the operations' ids.

    Returns:
        By operation's id, what came of it. An error is the operation's own: it failed by itself.

    Raises:
        LaunchError: the device does not compute any more.
    """
    try:
        passed = base(batch_of(wanted), mode_of(wanted))
    except Exception as error:
        found = _told(error)
    else:
        return {
            one.operation.id: _checked(
                passed.losses[one.operation.id], passed.tokens[one.operation.id], passed.pairs.get(one.operation.id, {})
            )
            for one in wanted
        }
    # Out of the handler, whose traceback holds the tensors of the pass.
    require_device(base.model.device)
    if len(wanted) == 1:
        return {wanted[0].operation.id: found}
    _log.warning("a pass for %d operations failed, and is made in halves: %s", len(wanted), found)
    half = len(wanted) // 2
    return {**run_pass(base, wanted[:half], mode_of), **run_pass(base, wanted[half:], mode_of)}


def require_device(device: torch.device) -> None:
    """Raise LaunchError if a device does not compute any more, as a GPU after a fault in a kernel."""
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        alive = torch.ones(1, device=device).add_(1).item() == 2
    except RuntimeError as error:
        raise LaunchError(f"{device} does not compute any more: {error}") from error
    if not alive:
        raise LaunchError(f"{device} does not compute any more")


def _told(error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in str(error):
        _log.warning("a pass needs more memory than there is: %s", error)
        return ApiError(
            "The pass needs more memory than the server has; send fewer rows, or shorter ones, at a time.",
            400,
            "too_large",
            "rows",
        )
    return error.with_traceback(None)


def _checked(loss: float, tokens: int, pairs: dict[str, Pair]) -> Yielded | Exception:
    if not math.isfinite(loss):
        return NotFiniteError("the loss is not finite; the step is refused; load an auxiliary with smaller weights")
    for site, pair in pairs.items():
        for name, tensor in (("x", pair.x), ("g", pair.g)):
            if not tensor.isfinite().all():
                return NotFiniteError(f"{name} at site {site} holds NaN or infinity; the step is refused")
    return Yielded(loss, tokens, pairs)
