"""Lists as OpenAI sends them: a page of objects, and where the next one begins.

Which rows stand on a page is the catalogue's to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

from serve.failures import ApiError

T = TypeVar("T", bound=BaseModel)

After = Annotated[
    str | None, Query(max_length=128, description="The id of the last object of the page before; without it, the first")
]
"""The query parameter `after`."""
Limit = Annotated[int, Query(ge=1, le=100, description="The most objects on the page")]
"""The query parameter `limit` of every list but that of files; give it OpenAI's default, 20."""


class Listing(BaseModel, Generic[T]):
    """One page of a list; the next one is asked for with `after` set to `last_id`."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[T], has_more: bool) -> Listing[T]:
        """The page that holds these objects, each of which has an `id`."""
        ids = [vars(item)["id"] for item in data]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return cls(data=list(data), first_id=first, last_id=last, has_more=has_more)


def unknown_cursor(kind: str, after: str | None) -> ApiError:
    """The answer to an `after` that is no object of the asker's.

    Args:
        kind: what is listed, in words, such as `file`.
    """
    return ApiError(f"No such {kind}: {shown(after or '')}", 404, param="after")


def shown(text: str, most: int = 80) -> str:
    """Text from outside for a message: short, on one line, without characters that act on a terminal."""
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: most + 1])
    return plain if len(text) <= most else f"{plain[:most]}..."
