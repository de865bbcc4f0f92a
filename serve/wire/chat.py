"""OpenAI's chat completions as types: what a request may hold, and the shape of every answer.

Checks that need a tokenizer or a model are left to the engine."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from serve.failures import ApiError
from serve.wire.base import LogitBias, Request, StreamOptions, Usage, at_most, stops

_MOST_MESSAGES, _MOST_PARTS, _MOST_PARTS_IN_ALL = 2048, 256, 4096
_ABSENT = {
    "tools": "tools",
    "tool_choice": "tools",
    "parallel_tool_calls": "tools",
    "functions": "tools",
    "function_call": "tools",
    "response_format": "output formats other than text",
    "audio": "audio",
    "prediction": "predicted outputs",
    "reasoning_effort": "reasoning settings",
    "verbosity": "verbosity settings",
    "web_search_options": "web search",
    "modalities": "modalities other than text",
    "store": "stored answers",
    "service_tier": "service tiers",
    "moderation": "moderation",
    "prompt_cache_options": "prompt cache",
    "prompt_cache_retention": "prompt cache",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory",),
}
"""Values that ask for nothing."""


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


_Parts = Annotated[list[TextPart], Field(max_length=_MOST_PARTS, fail_fast=True)]


def _content(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _MOST_PARTS:
        raise ValueError(f"has {len(value)} parts; at most {_MOST_PARTS} are taken")
    kinds = [part.get("type") for part in value if isinstance(part, dict)] if isinstance(value, list) else []
    if other := [kind for kind in kinds if kind != "text"]:
        raise ValueError(f"a part of type {other[0]!r} is not supported; this model reads text parts alone")
    if not isinstance(value, str | list):
        raise ValueError("content is a string, or a list of text parts")
    return value


def _few_parts(messages: Any) -> Any:
    given = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in given if isinstance(message, dict)]
    count = sum(len(content) for content in contents if isinstance(content, list))
    if count > _MOST_PARTS_IN_ALL:
        raise ValueError(f"the messages have {count} parts together; at most {_MOST_PARTS_IN_ALL} are taken")
    return messages


class ChatMessage(Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | _Parts, BeforeValidator(_content)]
    name: str | None = None
    """Accepted for OpenAI's clients; training does not read it, and so the model does not either."""
    refusal: None = None
    weight: Literal[0, 1] | None = None
    """Accepted so that a training example can be sent as it is."""

    @property
    def text(self) -> str:
        """What was said."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Request):
    """The body of `POST /v1/chat/completions`; `null` means a field's default, as it does at OpenAI."""

    model: str
    messages: Annotated[list[ChatMessage], BeforeValidator(_few_parts), at_most(_MOST_MESSAGES)] = Field(
        min_length=1, max_length=_MOST_MESSAGES, fail_fast=True
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """What `max_tokens` is called now; unset both, the model's context is the limit."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[tuple[str, ...], BeforeValidator(stops, json_schema_input_type=str | list[str])] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Annotated[Annotated[dict[str, str], Field(max_length=16)] | None, at_most(16)] = None
    """Accepted for OpenAI's clients; answers are not stored."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """Accepted for OpenAI's clients; no prompts are kept."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for field, what in _ABSENT.items():
            if values.get(field) not in (None, *_NEUTRAL.get(field, ())):
                raise ApiError(
                    f"{field} is not supported: this service has no {what}, it continues a conversation with text; "
                    "leave it out",
                    code="unsupported_parameter",
                    param=field,
                )
        return {key: value for key, value in values.items() if key not in _ABSENT}


class TokenLogprob(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8; None for a token that is part of a character."""


class ScoredToken(TokenLogprob):
    """A token of the answer, with the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a stretch of tokens."""

    content: list[ScoredToken]
    refusal: None = None


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage = Field(default_factory=AssistantMessage)
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletion(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


def _absent(value: object) -> bool:
    return value is None


class ChatDelta(BaseModel):
    """What a chunk adds to a message; fields that it does not add are left out."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_absent)
    content: str | None = Field(default=None, exclude_if=_absent)
    refusal: None = Field(default=None, exclude_if=_absent)


class ChatChunkChoice(BaseModel):
    """A stretch of one answer in a stream."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
