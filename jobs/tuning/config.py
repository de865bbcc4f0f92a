"""The settings of `jobs.tune`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from ot_ray.artifacts import BundleSource
from ot_ray.client import OfferedBundle
from ot_ray.config import Config
from ot_ray.data import DataConfig
from ot_ray.data.images import ImageConfig
from ot_ray.launch import SearchConfig
from ot_ray.model import BottleneckSettings, LoraSettings, Method
from ot_ray.training import TrainingConfig
from ot_ray.training.distill_config import require_text_or_images


class TuneTraining(TrainingConfig):
    """The optimiser run of a tuning."""

    steps: int = Field(default=0, ge=0)
    """Optimiser steps; 0, or left out, where `epochs` says how far to go."""
    warmup_share: float | None = Field(default=None, ge=0, le=1)
    """`warmup_steps` as a share of all steps."""


class UploadConfig(Config):
    """The adapter's way back to the service that offers the bundle."""

    suffix: str = "default"
    """The customer's name for it, part of the model's id; the last one accepted under a suffix is the current one."""
    wait_s: float = Field(default=3600.0, gt=0)
    """Seconds to wait until the adapter is inspected."""


class TuneConfig(Config):
    """A bundle, a customer's data, and how to tune."""

    bundle: OfferedBundle
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
    training: TuneTraining
    """The optimiser run."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data, in place of `training.steps`."""
    examples_per_step: int | None = Field(default=None, ge=1)
    """Examples an optimiser step, in place of `training.batch_size`: the batch has as many sequences as hold so many
    on average, since short examples share a sequence."""
    search: SearchConfig | None = None
    """Try several learning rates side by side on Ray, and keep the adapter with the lowest validation loss on the
    emulated model; unset, `training.lr` is taken as it is."""
    output: str
    """Folder or `s3://` address of the adapter; must be empty."""
    upload: UploadConfig | None = None
    """Send the adapter to the service that `bundle.url` names; its key is taken from OT_RAY_API_KEY."""
    checkpoints: str | None = None
    """Folder or address for checkpoints, from which a run that was stopped goes on."""
    events: str | None = None
    """Folder or address for progress files, one each, numbered. Set, `output` holds more than the adapter, and may
    hold what a stopped run left there: `step-<n>`, the adapter after each epoch, `adapter`, the last one,
    `result.csv`, and once all is there `result.json`."""
    time_limit_s: float | None = Field(default=None, gt=0)
    """Seconds after which a run that is not done ends with an error."""

    @field_validator("bundle", mode="before")
    @classmethod
    def _any_bundle(cls, bundle: Any) -> Any:
        return bundle.model_dump() if type(bundle) is BundleSource else bundle

    @field_validator("training", mode="before")
    @classmethod
    def _any_training(cls, training: Any) -> Any:
        return training.model_dump() if type(training) is TrainingConfig else training

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TuneConfig:
        if (self.training.steps == 0) == (self.epochs is None):
            both = f"training.steps is {self.training.steps} and epochs is {self.epochs}"
            raise ValueError(f"{both}; set one of them, and the other to nothing: training.steps=0 or epochs=null")
        if self.training.warmup_share is not None and self.training.warmup_steps:
            raise ValueError("training.warmup_steps and training.warmup_share are both set; leave one out")
        if self.events is not None and self.images is not None:
            raise ValueError("events is set, but the data are images; progress is told of text only")
        return self

    @model_validator(mode="after")
    def _upload_has_a_service(self) -> TuneConfig:
        if self.upload is not None and self.bundle.url is None:
            raise ValueError("upload is set, but bundle.url is not, which says where to; set bundle.url")
        if self.upload is not None and self.events is not None:
            raise ValueError("upload is set beside events, which are of jobs inside the service; leave one out")
        return self

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
        if self.epochs is not None or self.events is not None or self.time_limit_s is not None:
            raise ValueError(
                "search is set beside epochs, events or time_limit_s, which are of one run; set training.steps alone"
            )
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
