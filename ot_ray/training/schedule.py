"""The learning rate of each step; a pure function of the step, so there is no scheduler state to lose."""

from __future__ import annotations

import math

from ot_ray.training.config import TrainingConfig


def lr_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimiser step `step`, counted from 0.

    Linear warm-up to `config.lr` over `warmup_steps`, then cosine or linear decay that would reach
    ``config.lr * config.final_lr_share`` one step after the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * shape)
