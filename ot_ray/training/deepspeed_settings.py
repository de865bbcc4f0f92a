"""Importing DeepSpeed and DeepSpeed's own dictionary of settings; the one place that makes it.

What the settings do to a module is deepspeed_engine.py's."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

from ot_ray.data.batches import rows_of
from ot_ray.errors import MissingDependencyError
from ot_ray.training.config import TrainingConfig

BUCKET = 50_000_000
"""Elements that travel in one message. DeepSpeed's own 500 million would hold 1 to 4 GB on every GPU."""


def deepspeed_settings(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary for a run.

    Raises:
        ConfigError: there are fewer rows in a batch than ranks.
    """
    largest = len(rows_of(config.batch_size, 0, world_size))
    return {
        # The engine weighs the rows itself, so that DeepSpeed needs only the number of passes.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": -(-largest // (config.micro_batch_size or largest)),
        "gradient_clipping": config.grad_clip,
        "zero_optimization": _zero(config),
        "bf16": {"enabled": config.precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def import_deepspeed() -> Any:
    """DeepSpeed, set up for the devices of this machine.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # Extensions are compiled once into this folder, by `make .venv` or by the first run.
    from ot_ray.training.extensions import prepare_extensions

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError:
        raise MissingDependencyError(
            "DeepSpeed is not installed; install the platform's part: pip install 'ot_ray[platform]'"
        ) from None
    prepare_extensions()
    # It calls collectives by names that PyTorch has renamed, and is told so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def quiet() -> AbstractContextManager[Any]:
    """Standard output is for results; DeepSpeed prints there that its operators are there."""
    return contextlib.redirect_stdout(io.StringIO())


def _zero(config: TrainingConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
    }
    # Page-locked memory lets a GPU copy while it computes; without one it buys nothing.
    memory = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_optimizer:
        zero["offload_optimizer"] = memory
    if config.offload_parameters:
        zero["offload_param"] = memory
    return zero
