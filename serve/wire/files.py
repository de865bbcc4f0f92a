"""OpenAI's files as types: the object that describes one, what a form may ask for, and the limits on both.

Bodies are read in routes/uploads.py."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ot_ray.config import Config
from serve.wire.base import Request

HOUR_S, MONTH_S = 3600, 30 * 24 * 3600


class FilesConfig(Config):
    """What uploads may be like."""

    max_bytes: int = Field(default=512 * 2**20, ge=1024, le=2**40)
    """Largest file, in bytes."""
    uploads: int = Field(default=8, ge=1)
    """Uploads that one tenant may have under way on one replica; a further one is answered 429."""
    folder: str | None = None
    """Folder of this machine for files while they come in, before the store has them; null takes the system's own."""


class FileObject(BaseModel):
    """One file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    """Seconds since 1970."""
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None


class FileDeleted(BaseModel):
    """The answer to the deletion of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class ExpiresAfter(Request):
    """When a file is deleted by itself."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=HOUR_S, le=MONTH_S)
    """Seconds after the anchor: an hour to 30 days."""


class FileForm(Request):
    """The fields of an upload beside the file itself."""

    purpose: Literal["fine-tune"]
    expires_after: ExpiresAfter | None = None
