"""The DeepSpeed engine: ZeRO 0 to 3, CPU and GPU, float32 and bfloat16. The only module that imports it.

Workers are started by launch (or torchrun); this module finds the process group they set up."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ot_ray.errors import MissingDependencyError, TrainingError
from ot_ray.training.config import TrainingConfig
from ot_ray.training.engine import Batch, mean_of, parameter_groups

_TAG = "engine"


class DeepSpeedEngine:
    """A module under DeepSpeed. Only its trainable parameters get gradients and optimiser state.

    Args:
        module: takes a batch as keyword arguments and returns a mapping of scalars with `loss`.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        TrainingError: nothing is trainable.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        deepspeed = _import_deepspeed()
        # It prints on standard output that its operators are there.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._accumulation = accumulation_steps(config, self.world_size)
        self._config = config
        optimizer = torch.optim.AdamW(parameter_groups(module, config), lr=config.lr, betas=config.betas)
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=deepspeed_config(config, self.world_size)
            )
        self.module: nn.Module = self._engine.module
        self.device = torch.device(self._engine.device)
        self._gather = deepspeed.zero.GatheredParameters

    def step(self, micro_batches: Sequence[Batch], lr: float) -> dict[str, float]:
        if len(micro_batches) != self._accumulation:
            raise TrainingError(f"{len(micro_batches)} micro-batches were given, {self._accumulation} are set up")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        outputs = []
        for batch in micro_batches:
            output = self._engine(**{name: tensor.to(self.device) for name, tensor in batch.items()})
            self._engine.backward(output["loss"])
            self._engine.step()
            outputs.append({name: value.detach() for name, value in output.items()})
        norm = self._engine.get_global_grad_norm()
        return {**self.mean(mean_of(outputs)), "grad_norm": float(norm) if norm is not None else float("nan")}

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return dict(zip(values, (tensor / self.world_size).tolist(), strict=True))

    def barrier(self) -> None:
        dist.barrier()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise TrainingError(f"DeepSpeed found no checkpoint in {folder}; remove the run and start it again")

    def trainable_state(self) -> dict[str, torch.Tensor]:
        state = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                # One at a time, so that no rank holds more than one whole tensor beyond its shards.
                with self._gather([parameter], modifier_rank=None, enabled=self._config.zero_stage == 3):
                    if self.rank == 0:
                        state[name] = parameter.detach().cpu().clone()
        return state


def accumulation_steps(config: TrainingConfig, world_size: int) -> int:
    """Micro-batches a rank passes for one optimiser step.

    Raises:
        TrainingError: the batch does not divide over workers and micro-batches.
    """
    share, rest = divmod(config.batch_size, world_size)
    micro = config.micro_batch_size or share
    if rest or not share or share % micro:
        raise TrainingError(
            f"training.batch_size is {config.batch_size}, which does not divide over {world_size} workers with "
            f"micro_batch_size {micro}; use a multiple of {world_size * micro}"
        )
    return share // micro


def deepspeed_config(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own dictionary; the one place that makes it."""
    accumulation = accumulation_steps(config, world_size)
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _import_deepspeed() -> Any:
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
    return deepspeed
