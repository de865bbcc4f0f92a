"""A run's figures as Ray metrics, for whatever scrapes the cluster; what they are is computed elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

GAUGES = {
    "step": "Optimiser steps done.",
    "loss": "Loss of the last step.",
    "lm_loss": "Language-model part of the loss.",
    "kd_loss": "Distillation part of the loss.",
    "grad_norm": "Norm of the gradients before clipping.",
    "lr": "Learning rate of the last step.",
    "seconds": "Seconds that the last step took.",
    "tokens_per_s": "Tokens a second, all workers together.",
    "images_per_s": "Images a second, all workers together.",
    "data_wait_share": "Share of the step in which the worker waited for data, 0 to 1.",
    "fit_wait_share": "Share of the step in which the base model waited for auxiliaries' fits, 0 to 1.",
    "fits": "Steps of auxiliaries' optimisers, of all customers.",
    "refused": "Batches of gradients that were left out because they were not finite.",
    "mfu": "Model FLOPs utilisation, 0 to 1.",
    "seconds_left": "Seconds expected until the run is done.",
}


class RunMetrics:
    """Gauges ``ot_ray_<figure>`` (which Ray exports as ``ray_ot_ray_<figure>``) of one run.

    The only tag of our own is the model's name: tags that name runs, steps or customers would grow without bound.
    For rank 0 of a group.
    """

    def __init__(self, model: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            figure: Gauge(f"ot_ray_{figure}", meaning, tag_keys=("model",)).set_default_tags({"model": model})
            for figure, meaning in GAUGES.items()
        }

    def observe(self, figures: Mapping[str, float]) -> None:
        """Show these figures from now on. Unknown names are left out, and numbers that are not finite too."""
        for figure, value in figures.items():
            if figure in self._gauges and math.isfinite(value):
                self._gauges[figure].set(value)
