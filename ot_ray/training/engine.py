"""What the loop needs of an engine, and the plain PyTorch one that runs on a customer's machine.

Sharding over several workers is deepspeed_engine.py's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ot_ray.data.batches import rows_of
from ot_ray.data.packing import without_padding
from ot_ray.errors import TrainingError
from ot_ray.training import shards
from ot_ray.training.config import TrainingConfig
from ot_ray.training.shards import Piece, Read, Shard

Batch = Mapping[str, Tensor]


class Engine(Protocol):
    """A model with its optimiser.

    The model takes rows as keyword arguments and returns a mapping of scalars, `loss` among them, each a mean
    over those rows; so a step's figures do not depend on how the rows are spread over ranks and passes.
    """

    rank: int
    world_size: int
    module: nn.Module
    device: torch.device
    local_loss: float
    """Mean loss of this rank's own rows in the last step."""

    def step(self, batch: Batch, lr: float) -> dict[str, float]:
        """One optimiser step on the mean loss over the rows of all ranks.

        Args:
            batch: this rank's rows, in tensors of shape [rows, ...].
            lr: of this step.

        Returns:
            Every scalar that the model returned, averaged over all rows, and `grad_norm` before clipping.

        Raises:
            TrainingError: the batch does not hold this rank's number of rows.
        """
        ...

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Average numbers over the ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The JSON-able value of every rank, in order of ranks; every rank calls this together."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def sizes(self) -> dict[str, int]:
        """Number of elements of every trainable parameter."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """What this rank must save; over all ranks each element of each kind comes exactly once."""
        ...

    def restore(self, step: int, read: Read) -> None:
        """Take up the weights and AdamW's state as they were after `step` steps; every rank calls this together.

        Args:
            read: asked only for the ranges that this rank holds, whatever stage and world size wrote them.

        Raises:
            TrainingError: `read` gave another number of values than was asked for.
        """
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """The trainable weights, whole, on the CPU; on rank 0 (other ranks get an empty mapping)."""
        ...


def parameter_groups(module: nn.Module, config: TrainingConfig) -> list[dict]:
    """Trainable parameters for the optimiser; weight decay on matrices only.

    Raises:
        TrainingError: nothing is trainable.
    """
    learning = list(trainable(module).values())
    if not learning:
        raise TrainingError("no parameter of the model has gradients; choose a tuning method or emulator layers")
    # A parameter that ZeRO-3 has partitioned keeps its true shape beside it.
    matrices = {id(p) for p in learning if len(getattr(p, "ds_shape", p.shape)) > 1}
    groups = [
        {"params": [p for p in learning if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with gradients, by name; one that stands in several places comes once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def micro_batches(batch: Batch, config: TrainingConfig, rank: int, world_size: int) -> list[tuple[Batch, int]]:
    """Split a rank's rows into passes through the model, as many on every rank (ZeRO-3 works in lockstep), each
    without the columns that are padding in all of its rows; compiled layers get whole rows.

    Args:
        batch: the rows that `rows_of` gives this rank, in tensors of shape [rows, ...].

    Returns:
        Rows of each pass, and how many of them count: all, or 0 where one row only fills a rank that has none left.

    Raises:
        ConfigError: there are fewer rows than ranks.
        TrainingError: the batch does not hold this rank's number of rows.
    """
    largest, share = (len(rows_of(config.batch_size, r, world_size)) for r in (0, rank))
    given = next(iter(batch.values())).shape[0]
    if given != share:
        raise TrainingError(
            f"rank {rank} of {world_size} was given {given} rows; training.batch_size {config.batch_size} makes {share}"
        )
    size = config.micro_batch_size or largest
    passes = []
    for start in range(0, largest, size):
        count = max(0, min(size, share - start))
        rows = slice(start, start + count) if count else slice(0, 1)
        part = {name: tensor[rows] for name, tensor in batch.items()}
        # What is compiled is compiled for one shape.
        passes.append((part if config.compile else without_padding(part), count))
    return passes


def summed(outputs: Sequence[tuple[Mapping[str, Tensor], int]]) -> dict[str, float]:
    """Sums over the rows of several passes, from each pass's means over its rows and their number."""
    counted = [(output, count) for output, count in outputs if count]
    return {name: math.fsum(float(output[name]) * count for output, count in counted) for name in counted[0][0]}


class TorchEngine:
    """One process, one device, torch AdamW. Weights that learn become float32, frozen ones only where
    `config.precision` is float32; bfloat16 is autocast.

    Args:
        module: takes a batch as keyword arguments, returns a mapping of scalars with `loss`, each a mean over
            the batch's rows; moved to the device.
        device: unset, the first GPU if there is one.

    Raises:
        TrainingError: nothing is trainable.
    """

    rank = 0
    world_size = 1
    local_loss = math.nan

    def __init__(self, module: nn.Module, config: TrainingConfig, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.module = module.to(self.device)
        self._config = config
        for parameter in self.module.parameters():
            if parameter.requires_grad or config.precision == "float32":
                parameter.data = parameter.data.float().contiguous()
        groups = parameter_groups(module, config)
        fused = self.device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)

    def step(self, batch: Batch, lr: float) -> dict[str, float]:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        outputs = []
        for rows, count in micro_batches(batch, self._config, self.rank, self.world_size):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16"):
                output = self.module(**{name: tensor.to(self.device) for name, tensor in rows.items()})
            (output["loss"] * (count / self._config.batch_size)).backward()
            outputs.append(({name: value.detach() for name, value in output.items()}, count))
        norm = torch.nn.utils.clip_grad_norm_(trainable(self.module).values(), self._config.grad_clip or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        figures = {name: value / self._config.batch_size for name, value in summed(outputs).items()}
        self.local_loss = figures["loss"]
        return {**figures, "grad_norm": float(norm)}

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None

    def sizes(self) -> dict[str, int]:
        return {name: parameter.numel() for name, parameter in trainable(self.module).items()}

    def pieces(self) -> Iterator[Piece]:
        return shards.pieces(self._shards(), self._optimizer)

    def restore(self, step: int, read: Read) -> None:
        shards.restore(self._shards(), self._optimizer, step, read)

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in trainable(self.module).items()}

    def _shards(self) -> list[Shard]:
        return [Shard(name, 0, p.numel(), p, 0) for name, p in trainable(self.module).items()]
