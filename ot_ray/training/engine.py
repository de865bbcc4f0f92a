"""What the loop needs of an engine, and the plain PyTorch one that runs on a customer's machine.

Sharding over several workers is deepspeed_engine.py's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ot_ray.errors import TrainingError
from ot_ray.training.config import TrainingConfig

Batch = Mapping[str, torch.Tensor]


class Engine(Protocol):
    """A model with its optimiser. The model returns a mapping of scalars, `loss` among them."""

    rank: int
    world_size: int
    module: nn.Module
    device: torch.device

    def step(self, micro_batches: Sequence[Batch], lr: float) -> dict[str, float]:
        """One optimiser step on the mean loss of this rank's micro-batches and of all ranks.

        Returns:
            Every scalar that the model returned, averaged over micro-batches and ranks, and `grad_norm`
            before clipping.
        """
        ...

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Average numbers over the ranks."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the trainable weights and optimiser state into a folder."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what all ranks saved."""
        ...

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The trainable weights, whole, on the CPU; on rank 0 (other ranks get an empty mapping)."""
        ...


def parameter_groups(module: nn.Module, config: TrainingConfig) -> list[dict]:
    """Trainable parameters for the optimiser; weight decay on matrices only.

    Raises:
        TrainingError: nothing is trainable.
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not learning:
        raise TrainingError("no parameter of the model has gradients; choose a tuning method or emulator layers")
    groups = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def accumulation_steps(config: TrainingConfig, world_size: int) -> int:
    """Micro-batches a rank passes for one optimiser step.

    Raises:
        TrainingError: the batch does not divide over workers and micro-batches.
    """
    share, rest = divmod(config.batch_size, world_size)
    micro = config.micro_batch_size or max(1, share)
    if rest or share % micro:
        raise TrainingError(
            f"training.batch_size is {config.batch_size}, which does not divide over {world_size} workers with "
            f"micro_batch_size {micro}; use a multiple of {world_size * micro}"
        )
    return share // micro


def mean_of(outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Average scalars of several micro-batches."""
    return {name: sum(float(output[name]) for output in outputs) / len(outputs) for name in outputs[0]}


class TorchEngine:
    """One process, one device, torch AdamW. Weights that learn become float32, frozen ones only where
    `config.precision` is float32; bfloat16 is autocast.

    Args:
        module: takes a batch as keyword arguments, returns a mapping of scalars with `loss`; moved to the device.
        device: unset, the first GPU if there is one.

    Raises:
        TrainingError: nothing is trainable, or the batch does not divide into micro-batches.
    """

    rank = 0
    world_size = 1

    def __init__(self, module: nn.Module, config: TrainingConfig, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.module = module.to(self.device)
        self._config = config
        accumulation_steps(config, self.world_size)
        for parameter in self.module.parameters():
            if parameter.requires_grad or config.precision == "float32":
                parameter.data = parameter.data.float()
        self._optimizer = torch.optim.AdamW(parameter_groups(module, config), lr=config.lr, betas=config.betas)

    def step(self, micro_batches: Sequence[Batch], lr: float) -> dict[str, float]:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        outputs = []
        for batch in micro_batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16"):
                output = self.module(**{name: tensor.to(self.device) for name, tensor in batch.items()})
            (output["loss"] / len(micro_batches)).backward()
            outputs.append({name: value.detach() for name, value in output.items()})
        norm = torch.nn.utils.clip_grad_norm_(self._learning(), self._config.grad_clip or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {**mean_of(outputs), "grad_norm": float(norm)}

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)

    def barrier(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        state = {"weights": self._named(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "engine.pt", map_location=self.device, weights_only=True)
        ours = self._named()
        differing = sorted(_shapes(state["weights"]).items() ^ _shapes(ours).items())
        if differing:
            name, shape = differing[0]
            raise TrainingError(
                f"the checkpoint's trainable tensors are not the model's: {name} of shape {shape} is in one of them "
                "only; resume with the configuration that wrote it"
            )
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                ours[name].copy_(tensor)
        self._optimizer.load_state_dict(state["optimizer"])

    def trainable_state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._named().items()}

    def _learning(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _named(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
