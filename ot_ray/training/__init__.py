"""Engines, the loop, schedules and checkpoints. No Ray: workers are started by launch."""

from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.config import TrainingConfig
from ot_ray.training.deepspeed_engine import DeepSpeedEngine
from ot_ray.training.engine import Engine, TorchEngine
from ot_ray.training.loop import TrainingResult, train
from ot_ray.training.schedule import lr_at

__all__ = [
    "Checkpoints",
    "DeepSpeedEngine",
    "Engine",
    "TorchEngine",
    "TrainingConfig",
    "TrainingResult",
    "lr_at",
    "train",
]
