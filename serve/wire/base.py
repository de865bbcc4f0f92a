"""What requests and answers of several resources have in common.

Bodies have strict types, no unknown fields, and `null` for a field's default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from serve.failures import ApiError

_MOST_FIELDS = 100


class Request(BaseModel):
    """A request body: strict, frozen, and without fields that nobody knows."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > _MOST_FIELDS:
            # Told once: an error for each would cost far more than the body.
            names = ", ".join(list(values)[:3])
            raise ApiError(f"An object holds {len(values)} arguments, {names} and more; none has so many.")
        return {key: value for key, value in values.items() if value is not None}

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if _holds_half_a_character(value):
            raise ValueError("holds half of a surrogate pair; write the whole character")
        return value


def at_most(count: int) -> BeforeValidator:
    """Refuse a list or object of more items as a whole, before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"has {len(value)} items; at most {count} are taken")
        return value

    return BeforeValidator(check)


LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    at_most(1024),
]
"""By token id, what is added to a token's logit."""


def stops(value: Any) -> tuple[str, ...]:
    """OpenAI's `stop`: one string, or a list of at most four."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or len(given) > 4:
        raise ValueError("stop is one string or a list of at most 4 strings")
    if not all(isinstance(stop, str) and stop for stop in given):
        raise ValueError("a stop string must be text, and not empty")
    return tuple(given)


class StreamOptions(Request):
    """What a stream holds beside the text."""

    include_usage: bool = False
    """End with one more chunk that holds the usage of the whole request."""
    include_obfuscation: bool = False
    """Only false is taken: this service pads nothing."""


class Usage(BaseModel):
    """Tokens of a request; each prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def _holds_half_a_character(value: Any) -> bool:
    """Whether a string in it, at any depth, has no UTF-8: JSON can spell such strings, and little else takes them."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                return True
        elif isinstance(item, list):
            waiting += [inner for inner in item if isinstance(inner, str | list | dict)]
        elif isinstance(item, dict):
            waiting += item
            waiting += [inner for inner in item.values() if isinstance(inner, str | list | dict)]
    return False
