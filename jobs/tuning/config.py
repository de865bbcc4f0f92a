"""The settings of `jobs.tune`."""

from __future__ import annotations

from pydantic import Field, model_validator

from ot_ray.artifacts import BundleSource
from ot_ray.config import Config
from ot_ray.data import DataConfig
from ot_ray.data.images import ImageConfig
from ot_ray.launch import SearchConfig
from ot_ray.model import BottleneckSettings, LoraSettings, Method
from ot_ray.training import TrainingConfig
from ot_ray.training.distill_config import require_text_or_images


class TuneConfig(Config):
    """A bundle, a customer's data, and how to tune."""

    bundle: BundleSource
    """What to tune."""
    data: DataConfig | None = None
    """The private training text, for a language model."""
    images: ImageConfig | None = None
    """The private training images, for an image model; their classes become those of the adapter's head."""
    validation: DataConfig | None = None
    """Private validation text: the emulated model's loss on it is reported, and goes with the adapter."""
    validation_images: ImageConfig | None = None
    """Private validation images, in place of `validation` for an image model; their accuracy is reported too."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a sequence."""
    method: Method = "full"
    """What is trained inside the adapter layers."""
    lora: LoraSettings = LoraSettings()
    """For method `lora`."""
    bottleneck: BottleneckSettings = BottleneckSettings()
    """For method `bottleneck`."""
    training: TrainingConfig
    """The optimiser run."""
    search: SearchConfig | None = None
    """Try several learning rates side by side on Ray, and keep the adapter with the lowest validation loss on the
    emulated model; unset, `training.lr` is taken as it is."""
    output: str
    """Folder or `s3://` address of the adapter; must be empty."""
    checkpoints: str | None = None
    """Folder or address for checkpoints, from which a run that was stopped goes on."""

    @model_validator(mode="after")
    def _text_or_images(self) -> TuneConfig:
        require_text_or_images("data", self.data, self.images)
        if self.images is None and self.validation_images is not None:
            raise ValueError("validation_images is set, but data is text; set validation")
        if self.images is not None and self.validation is not None:
            raise ValueError("validation is set, but the data are images; set validation_images, and validation=null")
        return self

    @model_validator(mode="after")
    def _search_has_what_it_needs(self) -> TuneConfig:
        if self.search is None:
            return self
        if self.validation is None and self.validation_images is None:
            raise ValueError("search is set, but validation is not, by which rates are compared; set validation.source")
        steps, every, grace = self.training.steps, self.training.evaluate_every, self.search.grace_steps
        if not 0 < every <= steps:
            raise ValueError(
                f"training.evaluate_every is {every}, but a search compares its trials as they run; use 1..{steps}"
            )
        if grace is not None and grace > steps:
            raise ValueError(f"search.grace_steps is {grace}, but there are {steps} steps; use 1..{steps}")
        if self.checkpoints is not None:
            raise ValueError("search and checkpoints are both set, but a trial takes no checkpoints; leave one out")
        return self
