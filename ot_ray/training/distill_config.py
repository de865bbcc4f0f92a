"""The configuration of a distillation, apart from the workers it runs on."""

from __future__ import annotations

from pydantic import Field, model_validator

from ot_ray.config import Config
from ot_ray.data import DataConfig
from ot_ray.data.images import ImageConfig
from ot_ray.data.streaming import StreamConfig
from ot_ray.model import DistillLoss, EmulatorConfig, ModelConfig, SplitPlan
from ot_ray.training.config import TrainingConfig


class DistillTraining(TrainingConfig):
    """An optimiser run that may be left out."""

    steps: int = Field(ge=0)
    """Optimiser steps; 0 publishes the emulator as it is compressed, undistilled."""


class DistillConfig(Config):
    """What an emulator is distilled from, on what, and how. Travels to every worker as plain values."""

    model: ModelConfig
    """The full model."""
    split: SplitPlan
    """Adapter and emulator sizes."""
    emulator: EmulatorConfig = EmulatorConfig()
    """How the middle is compressed."""
    kept: tuple[int, ...] | None = None
    """The layers of the middle that the emulator starts from, where whoever starts the run has chosen them; unset,
    the uniform choice."""
    data: StreamConfig | None = None
    """The owner's public text, for a language model; never a customer's."""
    images: ImageConfig | None = None
    """The owner's public images, for an image model, of any classes or none; never a customer's. They are distilled
    by the output of the middle alone."""
    validation: DataConfig | None = None
    """Held-out public text on which the emulator gap is measured; unset, none is measured."""
    validation_images: ImageConfig | None = None
    """Held-out public images, of the classes of the full model's head, on which the emulator gap is measured;
    unset, none is measured."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a training sequence."""
    loss: DistillLoss = DistillLoss()
    """Weights of the objective."""
    training: DistillTraining
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

    @model_validator(mode="after")
    def _text_or_images(self) -> DistillConfig:
        require_text_or_images("data", self.data, self.images)
        if self.images is None and self.validation_images is not None:
            raise ValueError("validation_images is set, but a language model is distilled; set validation")
        if self.images is not None and self.validation is not None:
            raise ValueError(
                "validation is set, but an image model is distilled; set validation_images, and validation=null"
            )
        if self.images is not None and self.loss != DistillLoss():
            raise ValueError("loss is set, but images are distilled by the middle's output alone; leave it out")
        return self

    @property
    def text(self) -> StreamConfig:
        """The text that a language model is distilled on."""
        assert self.data is not None
        return self.data


def require_text_or_images(field: str, text: Config | None, images: Config | None) -> None:
    """Refuse a configuration with both or neither, by a ValueError that pydantic takes up.

    Args:
        field: the name of the field that holds the text.
    """
    if (text is None) == (images is None):
        given, way_out = "both are set", f"leave one out: {field}=null or images=null"
        if text is None:
            given, way_out = "neither is set", f"set {field}.source=... or images.source=..."
        raise ValueError(f"{field} is for language models and images for image models, and {given}; {way_out}")
