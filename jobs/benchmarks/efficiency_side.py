"""One side of the efficiency benchmark in a process of its own: builds the model, tunes, prints JSON.

Which sides run when, and the comparison, are efficiency.py's."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from jobs.benchmarks.shapes import Shape
from jobs.benchmarks.sides import now, peak_bytes, random_batches, random_model, resident_bytes
from ot_ray.config import Config
from ot_ray.model import LanguageModel, LoraSettings, Method, SplitPlan, prepare_tuning, trainable_parameters
from ot_ray.model.language import compiled_layers
from ot_ray.training import TorchEngine, TrainingConfig

Side = Literal["FT", "FT+LoRA", "OT", "OT+LoRA", "Trainer"]
LEARNING_RATE = 1e-4


class SideConfig(Config):
    """What one process measures."""

    side: Side
    """`FT`: full fine-tuning, `FT+LoRA`: LoRA in every layer of the full model, `OT` and `OT+LoRA`: the adapter
    layers of the emulated model, or LoRA in them; `Trainer`: full fine-tuning by Transformers' own Trainer."""
    shape: Shape
    """The model, its split and the batch."""
    device: Literal["cpu", "cuda"]
    """Where it runs."""
    precision: Literal["float32", "bfloat16"]
    """Type of matrix products."""
    steps: int = Field(ge=1)
    """Steps that are timed."""
    warmup: int = Field(ge=1)
    """Steps before those."""
    lora: LoraSettings
    """For the LoRA sides."""
    compile: bool
    """Run the layers through `torch.compile`, on every side."""


class Measured(Config):
    """What a side says of its steps."""

    seconds: float
    """Of the timed steps."""
    losses: list[float]
    """Of every step, those before the clock started among them."""
    trainable_parameters: int
    """Scalars with gradients."""


def measure(config: SideConfig) -> dict[str, Any]:
    """Run one side.

    Returns:
        tokens a second, peak bytes, number of trainable parameters, and the losses.
    """
    device, shape = torch.device(config.device), config.shape
    before = resident_bytes()
    found = (_trainer if config.side == "Trainer" else _ours)(config, device)
    return {
        "tokens_per_s": shape.batch_size * shape.sequence_length * config.steps / found.seconds,
        "peak_bytes": peak_bytes(device, before),
        "trainable_parameters": found.trainable_parameters,
        "losses": found.losses,
    }


def _ours(config: SideConfig, device: torch.device) -> Measured:
    model = _prepared(config, device)
    shape = config.shape
    training = TrainingConfig(
        steps=config.warmup + config.steps,
        batch_size=shape.batch_size,
        precision=config.precision,
        compile=config.compile,
    )
    engine = TorchEngine(LanguageModel(model), training, device=config.device)
    engine.module.train()
    losses, start = [], 0.0
    with compiled_layers(model, config.compile):
        for i, batch in enumerate(_batches(config, device)):
            if i == config.warmup:
                start = now(device)
            losses.append(engine.step(batch, LEARNING_RATE)["loss"])
    return Measured(
        seconds=now(device) - start, losses=losses, trainable_parameters=trainable_parameters(engine.module)
    )


def _prepared(config: SideConfig, device: torch.device) -> Any:
    """The model of a side of ours, with gradients where the side tunes."""
    shape, plan = config.shape.config(), config.shape.split
    if config.side.startswith("OT"):
        # The emulated model alone: whoever tunes offsite never holds the full one.
        shape.num_hidden_layers = plan.depth
        model = random_model(shape, device)
    else:
        depth = shape.num_hidden_layers
        model = random_model(shape, device)
        # Every layer is tuned.
        plan = SplitPlan(bottom=depth, keep=1, top=0)
    if config.side == "FT":
        return model.requires_grad_(True)
    method: Method = "lora" if config.side.endswith("LoRA") else "full"
    return prepare_tuning(model, plan, method, config.lora)


def _trainer(config: SideConfig, device: torch.device) -> Measured:
    """Full fine-tuning as Transformers does it: the same tokens in the same order, AdamW without decay."""
    model: PreTrainedModel = random_model(config.shape.config(), device).float().requires_grad_(True)
    rows = [
        {"input_ids": ids, "labels": labels}
        for batch in _batches(config, torch.device("cpu"))
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    clock = _Clock(config.warmup, device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=config.warmup + config.steps,
            per_device_train_batch_size=config.shape.batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            bf16=config.precision == "bfloat16",
            torch_compile=config.compile,
            use_cpu=config.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock])  # type: ignore[arg-type] - a list does
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Measured(seconds=clock.seconds, losses=losses, trainable_parameters=trainable_parameters(model))


class _Clock(TrainerCallback):
    """Times the steps after the warm-up."""

    seconds = 0.0

    def __init__(self, warmup: int, device: torch.device) -> None:
        self._warmup, self._device = warmup, device
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._warmup:
            self._start = now(self._device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self._warmup:
            self.seconds = now(self._device) - self._start


def _batches(config: SideConfig, device: torch.device) -> list[dict[str, torch.Tensor]]:
    shape = config.shape
    vocabulary = shape.config().vocab_size
    return random_batches(vocabulary, shape.batch_size, shape.sequence_length, config.warmup + config.steps, device)


if __name__ == "__main__":
    print(json.dumps(measure(SideConfig.model_validate_json(sys.argv[1]))))
