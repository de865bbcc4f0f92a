"""The DeepSpeed engine: ZeRO 0 to 3, CPU and GPU, float32 and bfloat16. The only module that imports it.

Workers are started by launch (or torchrun); this module finds the process group they set up."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ot_ray.errors import MissingDependencyError, TrainingError
from ot_ray.training.config import TrainingConfig
from ot_ray.training.engine import Batch, accumulation_steps, mean_of, parameter_groups

_TAG = "engine"


class DeepSpeedEngine:
    """A module under DeepSpeed. Only its trainable parameters get gradients and optimiser state.

    Args:
        module: takes a batch as keyword arguments and returns a mapping of scalars with `loss`.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        TrainingError: nothing is trainable, or the batch does not divide over workers and micro-batches.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        deepspeed = _import_deepspeed()
        # It prints on standard output that its operators are there.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._accumulation = accumulation_steps(config, self.world_size)
        self._config = config
        if config.precision == "float32":
            module.float()
        # DeepSpeed takes a step of its own while it sets up bfloat16; at a rate of 0 that decays nothing.
        optimizer = torch.optim.AdamW(parameter_groups(module, config), lr=0.0, betas=config.betas)
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=deepspeed_config(config, self.world_size)
            )
        if config.zero_stage == 0:
            # That step also counts in AdamW's bias correction, so it is forgotten.
            optimizer.state.clear()
        self.module: nn.Module = self._engine.module
        self.device = torch.device(self._engine.device)
        self._gathered = deepspeed.utils.safe_get_full_fp32_param

    def step(self, micro_batches: Sequence[Batch], lr: float) -> dict[str, float]:
        if len(micro_batches) != self._accumulation:
            raise TrainingError(f"{len(micro_batches)} micro-batches were given, {self._accumulation} are set up")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        outputs = []
        norm: float | None = None
        for batch in micro_batches:
            output = self._engine(**{name: tensor.to(self.device) for name, tensor in batch.items()})
            self._engine.backward(output["loss"])
            norm = self._norm_without_zero()
            self._engine.step()
            outputs.append({name: value.detach() for name, value in output.items()})
        return {**self.mean(mean_of(outputs)), "grad_norm": self._kept_norm() if norm is None else norm}

    def _kept_norm(self) -> float:
        # Where a gradient is not finite, DeepSpeed leaves the step out and keeps an older norm.
        norm = self._engine.get_global_grad_norm() if self._engine.was_step_applied() else None
        return math.nan if norm is None else float(norm)

    def _norm_without_zero(self) -> float | None:
        """The norm of the averaged gradients where DeepSpeed runs AdamW bare and keeps none itself."""
        if not isinstance(self._optimizer, torch.optim.AdamW):
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return dict(zip(values, (tensor / self.world_size).tolist(), strict=True))

    def barrier(self) -> None:
        dist.barrier()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)
        # It adds a pointer to the newest tag, which the commit replaces, and scripts; a checkpoint is data.
        for extra in (folder / "latest", *folder.glob("*.py")):
            extra.unlink(missing_ok=True)

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
                master = self._master(parameter)
                if self.rank == 0:
                    state[name] = master.detach().cpu().clone()
        return state

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole float32 copy that the optimiser keeps of a weight; every rank calls this together."""
        if self._config.zero_stage:
            return self._gathered(parameter)
        if self._config.precision == "float32":
            return parameter
        pairs = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
        return next(master for pair in pairs for weight, master in zip(*pair, strict=True) if weight is parameter)


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
