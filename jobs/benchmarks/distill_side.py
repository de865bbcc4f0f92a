"""One side of the distillation benchmark in a process of its own: builds the model, steps, prints JSON.

Which sides run when, and the comparison, are distill.py's."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from pydantic import Field
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from jobs.benchmarks.shapes import Shape
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
    before = psutil.Process().memory_info().rss
    step = (_ours if config.side.startswith("ours") else _plain)(config, device)
    batches = _batches(config, device)
    losses = [step(batch) for batch in batches[: config.warmup]]
    start = _now(device)
    losses += [step(batch) for batch in batches[config.warmup :]]
    seconds = _now(device) - start
    shape = config.shape
    flops = step_flops(shape.config(), shape.split, shape.batch_size, shape.sequence_length)
    peak = peak_flops(device, config.precision)
    return {
        "tokens_per_s": shape.batch_size * shape.sequence_length * config.steps / seconds,
        "flops_per_s": flops * config.steps / seconds,
        "mfu": flops * config.steps / seconds / peak if peak else None,
        "peak_bytes": _peak_bytes(device, before),
        "losses": losses,
    }


def _model(config: SideConfig) -> PreTrainedModel:
    """The full model with random weights, the same on every side: bfloat16 values, in the side's own type."""
    torch.manual_seed(0)
    with torch.device(config.device):
        model = AutoModelForCausalLM.from_config(config.shape.config(), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def _plain(config: SideConfig, device: torch.device) -> Step:
    """Full model and emulated copy as two Transformers models, each forwarded by itself, and torch AdamW."""
    plan = config.shape.split
    teacher = _model(config).float()
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
    model = _model(config)
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


def _batches(config: SideConfig, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Random tokens as the packer hands them over: one document a sequence, all of it learnt."""
    size = (config.shape.batch_size, config.shape.sequence_length)
    generator = torch.Generator().manual_seed(1)
    vocabulary = config.shape.config().vocab_size
    positions = torch.arange(size[1]).expand(size).contiguous()
    real = torch.ones(size, dtype=torch.bool)
    batches = []
    for _ in range(config.warmup + config.steps):
        ids = torch.randint(vocabulary, size, generator=generator)
        batches.append({"input_ids": ids, "labels": ids, "position_ids": positions, "real": real})
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_bytes(device: torch.device, before: int) -> int:
    """On a GPU what the allocator held at most; on a CPU the growth of the process since `before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says of a child counts its parent's peak as well.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 - before
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


if __name__ == "__main__":
    print(json.dumps(measure(SideConfig.model_validate_json(sys.argv[1]))))
