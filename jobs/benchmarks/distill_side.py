"""One side of the distillation benchmark in a process of its own: builds the model, steps, prints JSON.

Which sides run when, and the comparison, are distill.py's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from jobs.benchmarks.shapes import Shape
from jobs.benchmarks.sides import now, peak_bytes, random_batches, random_model, resident_bytes
from ot_ray.config import Config
from ot_ray.model import DistillLoss, DistillModel, DistillOptions, depth_of, emulate, uniform_layers
from ot_ray.model.families import layers_of
from ot_ray.training import TorchEngine, TrainingConfig
from ot_ray.training.utilisation import peak_flops, step_flops

Side = Literal["plain-float32", "ours-float32", "plain-bfloat16", "ours-bfloat16"]
Step = Callable[[Mapping[str, torch.Tensor]], dict[str, float]]


class SideConfig(Config):
    """What one process measures."""

    side: Side
    """`plain`: two Transformers models and torch AdamW; `ours`: the one pass. Then the type of matrix products."""
    shape: Shape
    """The model, its split and the batch."""
    device: Literal["cpu", "cuda"]
    """Where it runs."""
    steps: int = Field(ge=1)
    """Steps that are timed."""
    warmup: int = Field(ge=0)
    """Steps before those."""
    options: DistillOptions
    """How our pass is computed."""
    micro_batch_size: int | None = None
    """Sequences a pass, on our side; unset, the whole batch."""

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """Type of matrix products."""
        return "bfloat16" if self.side.endswith("bfloat16") else "float32"


def measure(config: SideConfig) -> dict[str, Any]:
    """Run one side.

    Returns:
        tokens a second, peak bytes, share of the device's arithmetic where that is known, and the losses of
        every step, those before the clock started among them.
    """
    device = torch.device(config.device)
    before = resident_bytes()
    step = (_ours if config.side.startswith("ours") else _plain)(config, device)
    shape = config.shape
    vocabulary = shape.config().vocab_size
    batches = random_batches(vocabulary, shape.batch_size, shape.sequence_length, config.warmup + config.steps, device)
    losses = [step(batch) for batch in batches[: config.warmup]]
    start = now(device)
    losses += [step(batch) for batch in batches[config.warmup :]]
    seconds = now(device) - start
    flops = step_flops(shape.config(), shape.split, shape.batch_size, shape.sequence_length)
    peak = peak_flops(device, config.precision)
    return {
        "tokens_per_s": shape.batch_size * shape.sequence_length * config.steps / seconds,
        "flops_per_s": flops * config.steps / seconds,
        "mfu": flops * config.steps / seconds / peak if peak else None,
        "peak_bytes": peak_bytes(device, before),
        "losses": losses,
    }


def _plain(config: SideConfig, device: torch.device) -> Step:
    """Full model and emulated copy as two Transformers models, each forwarded by itself, and torch AdamW."""
    plan = config.shape.split
    teacher = random_model(config.shape.config(), device).float()
    middle = plan.middle(depth_of(teacher))
    student = emulate(teacher, plan, uniform_layers(len(middle), plan.keep))
    emulator = layers_of(student)[plan.bottom : plan.bottom + plan.keep].requires_grad_(True)
    optimizer = torch.optim.AdamW(emulator.parameters(), lr=1e-4, weight_decay=0.0)
    weights = DistillLoss()

    def step(batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
        ids, labels = batch["input_ids"], batch["labels"]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            with torch.no_grad():
                wanted = teacher(ids, output_hidden_states=True, use_cache=False).hidden_states[middle.stop].float()
            output = student(ids, output_hidden_states=True, use_cache=False)
            seen = output.hidden_states[plan.bottom + plan.keep].float()
            logits = output.logits[:, :-1].float()
            lm = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            kd = ((wanted - seen).pow(2).mean((1, 2)) / wanted.pow(2).mean((1, 2))).mean()
            loss = weights.lm_weight * lm + weights.kd_weight * kd
        loss.backward()
        torch.nn.utils.clip_grad_norm_(emulator.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "lm_loss": lm.item(), "kd_loss": kd.item()}

    return step


def _ours(config: SideConfig, device: torch.device) -> Step:
    """The one pass, with the frozen weights in the type that the products take, under our engine."""
    shape, plan = config.shape, config.shape.split
    model = random_model(config.shape.config(), device)
    kept = uniform_layers(len(plan.middle(depth_of(model))), plan.keep)
    module = DistillModel(model, plan, kept, DistillLoss(), config.options).train()
    training = TrainingConfig(
        steps=config.steps + config.warmup,
        batch_size=shape.batch_size,
        micro_batch_size=config.micro_batch_size,
        precision=config.precision,
    )
    engine = TorchEngine(module, training, device=config.device)

    def step(batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
        figures = engine.step(batch, 1e-4)
        return {name: figures[name] for name in ("loss", "lm_loss", "kd_loss")}

    return step


if __name__ == "__main__":
    print(json.dumps(measure(SideConfig.model_validate_json(sys.argv[1]))))
