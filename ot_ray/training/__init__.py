"""Engines, the loop, schedules and checkpoints. No Ray: workers are started by launch."""

from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.config import TrainingConfig
from ot_ray.training.deepspeed_engine import DeepSpeedEngine
from ot_ray.training.distill_config import DistillConfig
from ot_ray.training.distillation import distill, kept_layers
from ot_ray.training.emulator_weights import distilled_state
from ot_ray.training.engine import Engine, TorchEngine
from ot_ray.training.gradient_batches import CustomerBatches, customer_rows
from ot_ray.training.gradient_checkpoints import GradientCheckpoints, GradientState
from ot_ray.training.gradient_fitting import Fitting, FittingHere, take_or_leave_out
from ot_ray.training.gradient_learning import GradientRun, learn
from ot_ray.training.loop import TrainingResult, train
from ot_ray.training.schedule import lr_at
from ot_ray.training.tuning import fit, fit_images

__all__ = [
    "Checkpoints",
    "CustomerBatches",
    "DeepSpeedEngine",
    "DistillConfig",
    "Engine",
    "Fitting",
    "FittingHere",
    "GradientCheckpoints",
    "GradientRun",
    "GradientState",
    "TorchEngine",
    "TrainingConfig",
    "TrainingResult",
    "customer_rows",
    "distill",
    "distilled_state",
    "fit",
    "fit_images",
    "kept_layers",
    "learn",
    "lr_at",
    "take_or_leave_out",
    "train",
]
