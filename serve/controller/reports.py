"""What a job may tell of itself, in files of its own prefix: data from outside, read into closed schemas.

Where the files lie and what becomes of what they say is left to watching.py and finishing.py."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from ot_ray.artifacts.strict_json import parse_json, parse_object
from ot_ray.config import Config
from ot_ray.errors import ArtifactError

_MOST_STEPS = 10**9
_MOST_TOKENS = 10**15
_TEXT_LIMIT = 2000
_PATH = re.compile(r"(?:[a-z][a-z0-9+.-]*://|(?<![\w.~/-])[~.]{0,2}/)[^\s'\"`,;:()<>?]*(?:\?[^\s'\"`,;()<>]*)?")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")

Step = Annotated[int, Field(ge=0, le=_MOST_STEPS)]
Tokens = Annotated[int, Field(ge=0, le=_MOST_TOKENS)]
StepFolder = Annotated[str, Field(pattern=r"^step-[0-9]{1,9}$")]


class Metrics(Config):
    """How the training stands after a step."""

    type: Literal["metrics"]
    """Tells the kinds of files apart."""
    step: Step
    """Optimiser steps that are done."""
    total_steps: Step | None = None
    """Steps of the whole run."""
    epoch: float | None = Field(default=None, ge=0)
    """Passes over the data that are done."""
    train_loss: float | None = None
    """Mean cross-entropy of a training token since the last figures, in nats."""
    train_mean_token_accuracy: float | None = None
    """Share of training tokens that the model names right."""
    lr: float | None = Field(default=None, ge=0)
    """Learning rate."""
    valid_loss: float | None = None
    """As `train_loss`, on the validation file."""
    valid_mean_token_accuracy: float | None = None
    """As `train_mean_token_accuracy`, on the validation file."""
    tokens: Tokens | None = None
    """Tokens trained on so far."""
    at: float
    """Seconds since 1970, by the job's clock."""

    @property
    def text(self) -> str:
        """The line that a customer reads."""
        step = f"Step {self.step}" + (f"/{self.total_steps}" if self.total_steps is not None else "")
        figures = {"training loss": self.train_loss, "validation loss": self.valid_loss}
        told = [f"{name}={value:.2f}" for name, value in figures.items() if value is not None]
        return f"{step}: {', '.join(told)}" if told else step

    @property
    def figures(self) -> dict[str, float | int]:
        """The numbers by name, without those that are unknown."""
        return self.model_dump(exclude={"type", "at"}, exclude_none=True)


class CheckpointMade(Config):
    """An adapter that stands in the output, at the end of an epoch."""

    type: Literal["checkpoint"]
    """Tells the kinds of files apart."""
    step: Step
    """Optimiser steps that are done."""
    folder: StepFolder
    """Where the adapter lies, under the output."""
    metrics: dict[str, float] = Field(default_factory=dict, max_length=50)
    """Figures by name."""
    at: float
    """Seconds since 1970, by the job's clock."""


class Message(Config):
    """A line for the customer."""

    type: Literal["message"]
    """Tells the kinds of files apart."""
    level: Literal["info", "warn", "error"]
    """An error is the reason for which the job ends."""
    message: str
    """The line."""
    at: float
    """Seconds since 1970, by the job's clock."""


Report = Metrics | CheckpointMade | Message
_KINDS: dict[str, type[Report]] = {"metrics": Metrics, "checkpoint": CheckpointMade, "message": Message}


class Result(Config):
    """`result.json`, written when all else of the output stands."""

    adapter: Literal["adapter"]
    """Folder of the final adapter under the output."""
    steps: Step
    """Optimiser steps of the run."""
    tokens: Tokens
    """Tokens trained on, over all epochs."""
    metrics: dict[str, float] = Field(default_factory=dict, max_length=50)
    """Figures by name."""


def parse_report(data: bytes) -> Report:
    """Read a progress file.

    Raises:
        ArtifactError: it is none.
    """
    kind = parse_object(data, "a progress file").get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ArtifactError(f"a progress file has type {str(kind)[:40]!r}; use one of {', '.join(_KINDS)}")
    return parse_json(_KINDS[kind], data, "a progress file")


def parse_result(data: bytes) -> Result:
    """Read `result.json`. Raises ArtifactError."""
    return parse_json(Result, data, "result.json")


def for_customers(text: str) -> str:
    """A message without what customers have no use for: paths but for their last part, control characters, length."""
    plain = _CONTROL.sub(" ", text)
    plain = _PATH.sub(lambda match: match[0].partition("?")[0].rstrip("/").rpartition("/")[2], plain).strip()
    return plain if len(plain) <= _TEXT_LIMIT else f"{plain[: _TEXT_LIMIT - 3]}..."
