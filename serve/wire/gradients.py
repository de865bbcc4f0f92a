"""Gradient learning as types: what customers ask of a session, and the shape of the answers.

Limits that a service sets are checked by the routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from serve.wire.base import Request, at_most
from serve.wire.fine_tuning import checked_metadata

Mode = Literal["alone", "joint", "collaboration"]
Fit = Literal["client", "server"]
Coding = Literal["none", "bfloat16", "int8", "fp8"]
_Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Group = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Learnt = Annotated[int, Field(ge=0, le=1)]
_MOST_ROWS, _MOST_TOKENS = 1024, 2**20


class AuxiliaryRequest(Request):
    """What stands beside every site."""

    kind: Literal["low_rank", "linear", "mlp"] = "low_rank"
    """`low_rank`: two factors, as LoRA's. `linear`: a map of the site's own size. `mlp`: two maps and a ReLU."""
    rank: int = Field(default=8, ge=1, le=2**16)
    """Inner width of `low_rank` and `mlp`."""
    alpha: float = Field(default=8.0, gt=0, le=1e6)
    """`low_rank` and `mlp` are multiplied by alpha / rank."""
    seed: int = Field(default=0, ge=0, le=2**62)
    """Of the random start, whose output is zero."""


class FittingRequest(Request):
    """How the server fits."""

    reduction: Literal["sum", "mean"] = "sum"
    """Over the batches of an interval."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What makes a step of the gradient."""
    lr: float = Field(default=1e-3, gt=0, le=1e6)
    """Highest learning rate."""
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)
    """Of every tensor."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's averaging factors."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of SGD."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    warmup_fits: int = Field(default=0, ge=0, le=2**31 - 1)
    """Fits over which the rate rises linearly."""
    fits: int = Field(default=1, ge=1, le=2**31 - 1)
    """Fits until the rate would be 0, where it falls."""


class SessionRequest(Request):
    """The body of `POST /v1/cola/sessions`."""

    model: str | None = Field(default=None, max_length=256)
    """The base model; there is one."""
    sites: Annotated[list[_Pattern], at_most(64)] = Field(min_length=1, max_length=64)
    """Shell patterns for names of the model's maps, such as `*.q_proj`; `GET /v1/cola/sites` lists them."""
    auxiliary: AuxiliaryRequest = AuxiliaryRequest()
    mode: Mode = "alone"
    """`alone`: rows go through this session's auxiliary. `joint`: the group's sessions share one. `collaboration`: rows
    go through the mean of the group's auxiliaries, each fitted to its own session's rows."""
    group: _Group | None = None
    """Which of the tenant's sessions belong together; for `joint` and `collaboration`."""
    fit: Fit = "client"
    """`client`: gradients are handed out, and fitted auxiliaries taken back. `server`: the server fits."""
    interval: int | None = Field(default=None, ge=1, le=2**16)
    """Batches after which the server fits by itself; null leaves it to `step`."""
    fitting: FittingRequest = FittingRequest()
    metadata: Annotated[dict[str, str] | None, BeforeValidator(checked_metadata)] = None


class Row(Request):
    """One row of text."""

    tokens: Annotated[list[_Token], at_most(_MOST_TOKENS)] = Field(min_length=1)
    """Token ids."""
    loss_mask: Annotated[list[_Learnt] | None, at_most(_MOST_TOKENS)] = None
    """1 for each token that is learnt, 0 for one that is only read; null learns all. The first token is predicted by
    nothing, and so never learnt."""


class ForwardBackwardRequest(Request):
    """The body of `POST /v1/cola/sessions/{id}/forward_backward`."""

    number: _Number
    """Of the operation: 0, 1, 2 and so on in one session."""
    rows: Annotated[list[Row], at_most(_MOST_ROWS)] = Field(min_length=1)
    coding: Coding = "none"
    """Of the gradients: whole, in 16 bits, or in 8 with a scale for each position."""


class StepRequest(Request):
    """The body of `POST /v1/cola/sessions/{id}/step` and of `.../save`."""

    number: _Number
    """Of the operation."""


class SampleRequest(Request):
    """The body of `POST /v1/cola/sessions/{id}/sample`."""

    number: _Number
    """Of the operation."""
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[_Token], Field(min_length=1), at_most(_MOST_TOKENS)]
    """Text, or token ids."""
    max_tokens: int = Field(default=16, ge=1)
    """Longest answer."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of the probability that is sampled from, the likeliest tokens first."""
    seed: int | None = Field(default=None, ge=0, le=2**62)
    """The same seed gives the same text; null draws one."""


class SiteObject(BaseModel):
    """One map of the base model."""

    name: str
    layout: Literal["linear", "conv", "embedding"]
    inputs: int
    outputs: int
    transposed: bool
    kernel: list[int]
    stride: list[int]
    padding: list[int] | str
    dilation: list[int]


class SiteList(BaseModel):
    """The answer to `GET /v1/cola/sites`."""

    object: Literal["list"] = "list"
    data: list[SiteObject]


class SessionObject(BaseModel):
    """A session."""

    id: str
    object: Literal["cola.session"] = "cola.session"
    model: str
    status: Literal["open", "closed"]
    sites: list[SiteObject]
    auxiliary: AuxiliaryRequest
    mode: Mode
    group: str | None
    fit: Fit
    interval: int | None
    fitting: FittingRequest
    version: int
    """How often its auxiliary was changed."""
    next_number: int
    """Of the next operation."""
    created_at: int
    """Seconds since 1970."""
    expires_at: int
    """When it is closed, if nothing is asked of it."""
    metadata: dict[str, str] | None


class QueueState(BaseModel):
    """What is before an operation that is not over."""

    ahead: int
    """Operations of all customers that came earlier. Customers take turns, so that its own turn may come sooner."""
    rows: int
    """Rows of these."""
    position: int
    """Place among its own session's operations, from 1 on."""


class OperationObject(BaseModel):
    """One operation of a session."""

    object: Literal["cola.operation"] = "cola.operation"
    session: str
    number: int
    kind: Literal["forward_backward", "load", "step", "sample", "save"]
    status: Literal["queued", "running", "succeeded", "failed"]
    version: int | None
    """Of the auxiliary that its pass went through, or that it made."""
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    """As the body of an error has it."""
    queue: QueueState | None
    created_at: int
    """Seconds since 1970."""
    finished_at: int | None
