"""The configuration of a distillation, apart from the workers it runs on."""

from __future__ import annotations

from pydantic import Field

from ot_ray.config import Config
from ot_ray.data import DataConfig
from ot_ray.data.streaming import StreamConfig
from ot_ray.model import DistillLoss, ModelConfig, SplitPlan
from ot_ray.training.config import TrainingConfig


class DistillConfig(Config):
    """What an emulator is distilled from, on what, and how. Travels to every worker as plain values."""

    model: ModelConfig
    """The full model."""
    split: SplitPlan
    """Adapter and emulator sizes."""
    data: StreamConfig
    """The owner's public text; never a customer's."""
    validation: DataConfig | None = None
    """Held-out public text on which the emulator gap is measured; unset, none is measured."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a training sequence."""
    loss: DistillLoss = DistillLoss()
    """Weights of the objective."""
    training: TrainingConfig
    """The optimiser run; ZeRO stage and precision among it."""
    store: str
    """Folder or `s3://` address where checkpoints and bundles go."""
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    """Name of the run; the same name resumes from its last checkpoint."""
    model_version: str | None = None
    """`ModelSource.version`, where whoever starts the run has it already; unset, rank 0 finds it out while the
    others wait, which is too long for large models in folders."""
    data_digest: str | None = None
    """Digest of the training text, where whoever starts the run has it already; unset, rank 0 computes it while
    the others wait, which is too long for large corpora in folders."""
