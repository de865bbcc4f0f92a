"""OpenAI's models as types."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One model in `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970."""
    owned_by: str


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class DeletedModel(BaseModel):
    """The answer to `DELETE /v1/models/{model}`."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True
