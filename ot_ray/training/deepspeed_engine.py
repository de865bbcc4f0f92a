"""The DeepSpeed engine: ZeRO 0 to 3, CPU and GPU, float32 and bfloat16, offload of optimiser and weights.

Workers are started by launch (or torchrun); this module finds the process group they set up."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ot_ray.training import shards
from ot_ray.training.config import TrainingConfig
from ot_ray.training.deepspeed_loading import Fill, load_partitioned, load_whole
from ot_ray.training.deepspeed_settings import deepspeed_settings, import_deepspeed, quiet
from ot_ray.training.deepspeed_shards import follow_masters, prepare_masters, shards_of
from ot_ray.training.engine import Batch, micro_batches, parameter_groups, summed, trainable
from ot_ray.training.shards import Piece, Read, Shard


class DeepSpeedEngine:
    """A module under DeepSpeed. Only its trainable parameters get gradients, optimiser state and, in
    bfloat16, float32 masters.

    Args:
        module: takes a batch as keyword arguments and returns a mapping of scalars with `loss`, each a mean
            over the batch's rows. Its parameters may lie on the meta device.
        fill: gives the values of whatever is on the meta device, and of every buffer that a checkpoint stores.
            ZeRO-3 asks for this rank's own ranges only.

    Raises:
        ConfigError: there are fewer rows in a batch than ranks.
        MissingDependencyError: DeepSpeed is not installed.
        TrainingError: nothing is trainable, or values are missing.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, fill: Fill | None = None) -> None:
        deepspeed = import_deepspeed()
        with quiet():
            deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else _CPU
        self.local_loss = math.nan
        self._config, self._stage = config, config.zero_stage
        settings = deepspeed_settings(config, self.world_size)
        parameter_groups(module, config)
        with quiet():
            self._load(module, fill, settings)
            # DeepSpeed takes a step of its own while it sets up bfloat16; at a rate of 0 that decays nothing.
            groups = parameter_groups(module, config)
            self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=self._adamw, config=settings
            )
        # That step also counts in AdamW's bias correction, so it is forgotten.
        self._adamw.state.clear()
        self.module: nn.Module = self._engine.module
        self._gathered = deepspeed.utils.safe_get_full_fp32_param
        if fill is not None and config.precision == "bfloat16":
            self._sharpen(fill)

    def step(self, batch: Batch, lr: float) -> dict[str, float]:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        outputs = []
        norm: float | None = None
        for rows, count in micro_batches(batch, self._config, self.rank, self.world_size):
            output = self._engine(**{name: tensor.to(self.device) for name, tensor in rows.items()})
            # DeepSpeed averages gradients over the ranks.
            share = count * self.world_size / self._config.batch_size
            self._engine.backward(output["loss"] * share, scale_wrt_gas=False)
            norm = self._norm_without_zero()
            self._engine.step()
            outputs.append(({name: value.detach() for name, value in output.items()}, count))
        sums = summed(outputs)
        self.local_loss = sums["loss"] / sum(count for _, count in outputs)
        figures = {name: value / self._config.batch_size for name, value in self._added(sums).items()}
        return {**figures, "grad_norm": self._kept_norm() if norm is None else norm}

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: value / self.world_size for name, value in self._added(values).items()}

    def gather(self, value: Any) -> list[Any]:
        # JSON in plain tensors, because PyTorch's own way for objects is pickle.
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([text.numel()], device=self.device))
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - text.numel())))
        return [
            json.loads(bytes(padded[: int(length)].tolist())) for padded, length in zip(texts, lengths, strict=True)
        ]

    def barrier(self) -> None:
        dist.barrier()

    def sizes(self) -> dict[str, int]:
        return {name: int(getattr(p, "ds_numel", p.numel())) for name, p in trainable(self.module).items()}

    def pieces(self) -> Iterator[Piece]:
        if self._stage == 0 and self.rank != 0:
            return iter(())
        return shards.pieces(self._shards(), self._adamw)

    def restore(self, step: int, read: Read) -> None:
        prepare_masters(self._optimizer, self._stage)
        shards.restore(self._shards(), self._adamw, step, read)
        follow_masters(self._optimizer, self._stage)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every trainable parameter, whole."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in trainable(self.module).items()}

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trainable weight in float32, whole, on the CPU, one at a time; all ranks go through them together."""
        replicated = {shard.name: shard.master for shard in self._shards()} if self._stage == 0 else {}
        for name, parameter in trainable(self.module).items():
            master = self._gathered(parameter) if self._stage else replicated[name]
            yield name, master.detach().cpu()

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: master.clone() for name, master in self.masters() if self.rank == 0}

    def _load(self, module: nn.Module, fill: Fill | None, settings: dict[str, Any]) -> None:
        dtype = torch.float32 if self._config.precision == "float32" else torch.bfloat16
        if self._stage == 3:
            load_partitioned(module, dtype, self.device, fill, settings)
        else:
            load_whole(module, dtype, self.device, fill)

    def _sharpen(self, fill: Fill) -> None:
        """Masters start from the values as they are stored, not from their bfloat16 rounding."""
        for shard in self._shards():
            shards.write(shard, fill(shard.name, shard.start, shard.start + shard.numel))

    def _shards(self) -> list[Shard]:
        return shards_of(self.module, self._optimizer, self._stage)

    def _added(self, values: Mapping[str, float]) -> dict[str, float]:
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return dict(zip(values, tensor.tolist(), strict=True))

    def _kept_norm(self) -> float:
        # Where a gradient is not finite, DeepSpeed leaves the step out and keeps an older norm.
        norm = self._engine.get_global_grad_norm() if self._engine.was_step_applied() else None
        return math.nan if norm is None else float(norm)

    def _norm_without_zero(self) -> float | None:
        """The norm of the averaged gradients where DeepSpeed runs AdamW bare and keeps none itself."""
        if not isinstance(self._optimizer, torch.optim.AdamW) or not self._engine.is_gradient_accumulation_boundary():
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))


_CPU = torch.device("cpu")
