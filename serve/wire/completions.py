"""OpenAI's completions as types: what a request may hold, and the shape of every answer.

Checks that need a tokenizer or a model are left to the engine."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from serve.wire.base import LogitBias, Request, StreamOptions, Usage, stops

_MOST_PROMPTS = 2048
_PROMPT = "a prompt is a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Bring OpenAI's four kinds of prompt to two: texts, or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if len(value) <= _MOST_PROMPTS and all(isinstance(item, str) for item in value):
            return value
        if _are_ids(value):
            return [value]
        if len(value) > _MOST_PROMPTS:
            raise ValueError(f"has {len(value)} prompts; at most {_MOST_PROMPTS} are taken")
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise ValueError(_PROMPT)


def _are_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


class CompletionRequest(Request):
    """The body of `POST /v1/completions`; `null` means a field's default, as it does at OpenAI."""

    model: str
    prompt: Annotated[
        list[str] | list[list[int]] | None,
        BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None),
    ] = None
    """None stands for the beginning of a document."""
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[tuple[str, ...], BeforeValidator(stops, json_schema_input_type=str | list[str])] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict)
    best_of: int | None = Field(None, ge=1)
    suffix: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None


class Logprobs(BaseModel):
    """Log-probabilities of a stretch of tokens; every list has one entry a token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """None for the first token of an echoed prompt, which nothing precedes."""
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Where each token starts in the choice's text, in characters."""

    def extend(self, other: Logprobs) -> None:
        """Append the tokens of `other`."""
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


class Choice(BaseModel):
    """One completion, or a stretch of it in a stream."""

    index: int
    text: str = ""
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The answer to a completion request, or one chunk of it in a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage | None = None
