"""OpenAI's fine-tuning jobs as types: what a request may hold, and the shape of every answer.

Whether the model and the files that a request names are there is left to the route."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from ot_ray.artifacts.manifest import NAME_PATTERN
from ot_ray.model import Method as TuningMethod
from serve.failures import ApiError
from serve.wire.base import Request

_SUFFIX = re.compile(NAME_PATTERN)
MOST_EPOCHS, LARGEST_BATCH, LARGEST_MULTIPLIER = 50, 256, 100.0


def _whole(highest: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value != "auto" and not (type(value) is int and 1 <= value <= highest):
            raise ValueError(f'use "auto", or a whole number from 1 to {highest}')
        return value

    return BeforeValidator(check)


def _multiplier(value: Any) -> Any:
    if value == "auto":
        return value
    if type(value) not in (int, float) or not 0 < value <= LARGEST_MULTIPLIER:
        raise ValueError(f'use "auto", or a number above 0 and up to {LARGEST_MULTIPLIER:g}')
    return float(value)


def _suffix(value: Any) -> Any:
    if not isinstance(value, str) or _SUFFIX.fullmatch(value):
        return value
    wrong = next((letter for letter in value if not re.match(r"[A-Za-z0-9._-]", letter)), None)
    holds = f"it holds U+{ord(wrong):04X} {unicodedata.name(wrong, 'a control character')}; " if wrong else ""
    raise ValueError(
        f"{holds}use 1 to 64 of the letters A-Z and a-z, digits, dots, underscores and hyphens, "
        "the first a letter or digit"
    )


def checked_metadata(value: Any) -> Any:
    """Metadata of any object, if it is within OpenAI's limits; raises ValueError."""
    if not isinstance(value, dict) or len(value) > 16:
        raise ValueError("metadata is an object of at most 16 texts")
    for key, text in value.items():
        if not isinstance(text, str):
            raise ValueError(f"the value of {key[:64]!r} must be text")
        if not 1 <= len(key) <= 64 or len(text) > 512:
            raise ValueError(f"{key[:64]!r}: keys are 1 to 64 characters, values at most 512")
        # A database stores neither.
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in key + text):
            raise ValueError(f"{key[:64]!r}: NUL and lone surrogates are no text")
    return value


def _no_integrations(value: Any) -> Any:
    if value != []:
        raise ApiError(
            "This service has no integrations, wandb neither; leave them out: a job's figures are in its events, its "
            "checkpoints and its results file.",
            code="unsupported_parameter",
            param="integrations",
        )
    return value


class Hyperparameters(Request):
    """How to train; "auto" is replaced once the data are counted."""

    n_epochs: Annotated[Literal["auto"] | int, _whole(MOST_EPOCHS)] = "auto"
    """Passes over the training file."""
    batch_size: Annotated[Literal["auto"] | int, _whole(LARGEST_BATCH)] = "auto"
    """Examples an optimiser step."""
    learning_rate_multiplier: Annotated[Literal["auto"] | float, BeforeValidator(_multiplier)] = "auto"
    """Times the base rate of the tuning method."""


class Supervised(Request):
    """Settings of supervised tuning."""

    hyperparameters: Hyperparameters | None = None


class Method(Request):
    """How the model learns from the file."""

    type: Literal["supervised"]
    supervised: Supervised | None = None

    @model_validator(mode="before")
    @classmethod
    def _supervised_only(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") in ("dpo", "reinforcement"):
            raise ApiError(
                f"method {values['type']} is not offered; use {{'type': 'supervised'}} with examples of good answers.",
                code="unsupported_parameter",
                param="method",
            )
        return values


class Offsite(Request):
    """What this service offers beyond OpenAI's fields (`extra_body` in its clients)."""

    tuning_method: TuningMethod | None = None
    """What is trained inside the adapter layers."""


class JobRequest(Request):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: str = Field(max_length=256)
    training_file: str = Field(max_length=256)
    validation_file: str | None = Field(None, max_length=256)
    suffix: Annotated[str | None, BeforeValidator(_suffix)] = None
    seed: int | None = Field(None, ge=0, lt=2**31)
    metadata: Annotated[dict[str, str] | None, BeforeValidator(checked_metadata)] = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated at OpenAI in favour of `method`."""
    integrations: Annotated[list[Any] | None, BeforeValidator(_no_integrations)] = None
    offsite: Offsite | None = None

    @property
    def asked(self) -> Hyperparameters:
        """The hyperparameters, wherever they stand."""
        inner = self.method.supervised if self.method else None
        return (inner and inner.hyperparameters) or self.hyperparameters or Hyperparameters()


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobHyperparameters(BaseModel):
    """As asked for, and as numbers once the data are counted."""

    n_epochs: Literal["auto"] | int
    batch_size: Literal["auto"] | int
    learning_rate_multiplier: Literal["auto"] | float


class JobSupervised(BaseModel):
    """Settings of supervised tuning."""

    hyperparameters: JobHyperparameters


class JobMethod(BaseModel):
    """How the model learns."""

    type: Literal["supervised"] = "supervised"
    supervised: JobSupervised


class JobOffsite(BaseModel):
    """What is this service's own about a job."""

    tuning_method: str
    bundle_id: str | None
    """The bundle that is tuned."""


class FineTuningJob(BaseModel):
    """One job; every field is always there."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: JobHyperparameters
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    """`paused` is not among the names of OpenAI's client, which passes it on as it is."""
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    method: JobMethod
    user_provided_suffix: str | None
    offsite: JobOffsite


class JobEvent(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(BaseModel):
    """Figures at a checkpoint's step; None where nothing was measured."""

    step: float | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class JobCheckpoint(BaseModel):
    """A model from the middle of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
