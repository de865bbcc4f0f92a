"""What a study computes, each piece on its own: zero-shot, full fine-tuning, an emulator, a row's tuned adapter.

Nothing here knows of Ray; which pieces there are and where they run is running.py's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load, save
from transformers import PreTrainedModel

from jobs.studies.config import Row
from ot_ray.artifacts.model_source import load_full
from ot_ray.config import Config
from ot_ray.data import PackedSequence
from ot_ray.errors import TrainingError
from ot_ray.evaluation import perplexity
from ot_ray.model import (
    DistillLoss,
    EmulatorConfig,
    ModelConfig,
    SplitPlan,
    compress,
    depth_of,
    emulate,
    load_emulator,
    merged_adapter_state,
    plug_in,
    prepare_tuning,
    trainable_parameters,
)
from ot_ray.model.choice import choose_layers, smaller_layers
from ot_ray.model.families import layers_of
from ot_ray.model.packed import with_smaller_layers
from ot_ray.store import open_store
from ot_ray.training import TrainingConfig, fit
from ot_ray.training.calibration import calibration_text
from ot_ray.training.local_distillation import distil_here

Result = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """The packed texts of a study."""

    public: Sequence[PackedSequence]
    train: Sequence[PackedSequence]
    test: Sequence[PackedSequence]


class ZeroShot(Config):
    """The full model as it is."""

    model: ModelConfig

    def compute(self, texts: Texts) -> Result:
        """`perplexity` on the test text and `parameters` of the full model."""
        model = load_full(self.model)
        return {"perplexity": _measured(model, texts.test), "parameters": model.num_parameters()}


class FineTuned(Config):
    """Full fine-tuning."""

    model: ModelConfig
    training: TrainingConfig

    def compute(self, texts: Texts) -> Result:
        """`perplexity` on the test text after tuning every weight on the customer's."""
        model = load_full(self.model).requires_grad_(True)
        torch.manual_seed(self.training.seed)
        fit(model, texts.train, self.training)
        return {"perplexity": _measured(model, texts.test)}


class Emulator(Config):
    """A compressed middle; `training` distils it, where it is set."""

    model: ModelConfig
    split: SplitPlan
    emulator: EmulatorConfig
    loss: DistillLoss
    training: TrainingConfig | None = None
    store: str
    weights: str
    """Key of its weights before they are packed, where they are not the full model's."""

    def compute(self, texts: Texts) -> Result:
        """`kept` layers, `perplexity` of the emulated model on the test text, and `ratio`, the emulator's bytes as a
        share of the middle's, both as they are in memory."""
        full = load_full(self.model)
        kept = kept_layers(full, self.split, self.emulator, texts.public)
        state = self._weights(full, kept, texts)
        if state is not None:
            open_store(self.store).write(self.weights, save(state))
        emulated = self.build(full, kept)
        middle = self.split.middle(depth_of(full))
        ratio = _bytes(emulated, range(self.split.bottom, self.split.bottom + self.split.keep)) / _bytes(full, middle)
        return {"kept": kept, "perplexity": _measured(emulated, texts.test), "ratio": ratio}

    def _weights(self, full: PreTrainedModel, kept: Sequence[int], texts: Texts) -> dict[str, torch.Tensor] | None:
        """The emulator's weights before they are packed; None where they are the full model's."""
        if self.training is not None:
            return distil_here(
                full, self.split, kept, texts.public, self.training, loss=self.loss, emulator=self.emulator
            )
        if not self.emulator.factored:
            return None
        state = smaller_layers(full, self.split, kept, self.emulator, calibration_text(texts.public))
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def build(self, full: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
        """The emulated model, from the full one and the weights that `compute` left."""
        emulated = with_smaller_layers(emulate(full, self.split, kept), self.split, self.emulator)
        if self.training is not None or self.emulator.factored:
            load_emulator(emulated, self.split, load(open_store(self.store).read(self.weights)))
        return compress(emulated, self.split, self.emulator)


class Tuned(Config):
    """A row's adapter: tuned on its emulator, measured there and plugged in."""

    model: ModelConfig
    row: Row
    training: TrainingConfig

    def compute(self, texts: Texts, zero: Result, reference: Result, made: Result, emulator: Emulator) -> Result:
        """The five settings by their names, and `trainable_parameters`, `kept`, `ratio`.

        Args:
            zero, reference, made: what `ZeroShot`, `FineTuned` and `emulator` computed.
        """
        full = load_full(self.model)
        emulated = emulator.build(full, made["kept"])
        torch.manual_seed(self.training.seed)
        tuned = prepare_tuning(emulated, emulator.split, self.row.method, self.row.lora, self.row.bottleneck)
        trainable = trainable_parameters(tuned)
        fit(tuned, texts.train, self.training)
        state = merged_adapter_state(tuned, emulator.split)
        settings = {
            "full_zero_shot": zero["perplexity"],
            "emulator_zero_shot": made["perplexity"],
            "full_fine_tuned": reference["perplexity"],
            "ot_emulator": _measured(tuned, texts.test),
            "ot_plug_in": _measured(plug_in(full, emulator.split, state), texts.test),
        }
        return {
            "settings": settings,
            "trainable_parameters": trainable,
            "parameters": zero["parameters"],
            "kept": made["kept"],
            "ratio": made["ratio"],
        }


def kept_layers(
    full: PreTrainedModel, split: SplitPlan, emulator: EmulatorConfig, public: Sequence[PackedSequence]
) -> list[int]:
    """The layers of the middle that an emulator keeps, by the choice that its settings name."""
    return choose_layers(full, split, emulator, calibration_text(public))


def _measured(model: PreTrainedModel | PeftModel, test: Sequence[PackedSequence]) -> float:
    found = perplexity(model, test)
    if not math.isfinite(found):
        raise TrainingError(f"the perplexity on the test text is {found}; lower lr")
    return found


def _bytes(model: PreTrainedModel, positions: range) -> int:
    layers = layers_of(model)
    tensors = (tensor for i in positions for tensor in (*layers[i].parameters(), *layers[i].buffers()))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
