"""Distilling an emulator in this process with plain PyTorch: small models, studies and tests.

Groups of workers, checkpoints and publishing are distillation.py's and the jobs'."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ot_ray.data import BatchStream, PackedSequence
from ot_ray.model import DistillLoss, DistillModel, EmulatorConfig, SplitPlan
from ot_ray.model.choice import smaller_layers
from ot_ray.training.calibration import calibration_text
from ot_ray.training.config import TrainingConfig
from ot_ray.training.engine import TorchEngine
from ot_ray.training.loop import Report, train


def distil_here(
    model: PreTrainedModel,
    plan: SplitPlan,
    kept: Sequence[int],
    sequences: Sequence[PackedSequence],
    config: TrainingConfig,
    *,
    loss: DistillLoss | None = None,
    emulator: EmulatorConfig | None = None,
    report: Report | None = None,
) -> dict[str, torch.Tensor]:
    """Distil the middle of a model into the layers that an emulator keeps of it (the paper's section 3.3).

    Args:
        model: the full model; it is left as it was, and held twice meanwhile.
        kept: which layers of the middle E starts from, counted from 0 at the first middle layer, ascending.
        sequences: the owner's public text, packed.
        emulator: how E is compressed; it learns as it will compute.
        report: called after each step with that step's figures.

    Returns:
        The emulator's weights in float32 on the CPU, named as `load_emulator` takes them: dense, to be packed by
        `compress`.

    Raises:
        SplitError: the plan does not fit the model, or `kept` the plan.
        TrainingError: the loss is not finite.
    """
    torch.manual_seed(config.seed)
    module = DistillModel(copy.deepcopy(model), plan, kept, loss or DistillLoss(), emulator=emulator)
    if emulator is not None and emulator.factored:
        module.start_from(smaller_layers(model, plan, kept, emulator, calibration_text(sequences)))
    engine = TorchEngine(module, config)
    train(engine, BatchStream(sequences, config.batch_size, config.seed), config, report=report)
    return {name: tensor.float().cpu().clone() for name, tensor in module.emulator_state().items()}
