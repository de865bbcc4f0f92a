"""What a request may ask for whatever the model, and what a model can take.

Prompts are checked where they are tokenised, in generation.py."""

from __future__ import annotations

import secrets

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serve.failures import ApiError
from serve.wire.chat import ChatRequest
from serve.wire.completions import CompletionRequest

# For architectures without learnt positions whose config states no length.
_UNSTATED_CONTEXT = 2048
_UNSUPPORTED = "unsupported_parameter"


def context_length(model: PreTrainedModel) -> int:
    """Largest number of tokens, prompt and completion together, that a model can attend to."""
    names = ("max_position_embeddings", "n_positions", "seq_length")
    lengths = (getattr(model.config, name, None) for name in names)
    return next((length for length in lengths if isinstance(length, int)), _UNSTATED_CONTEXT)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion: those of the generation config, and the tokenizer's own."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    tokens = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    return frozenset(token for token in tokens if isinstance(token, int))


def seed_of(asked: int | None) -> int:
    """The seed of a request: its own, or one that nobody knows."""
    return asked if asked is not None else secrets.randbits(62)


def check_supported(request: CompletionRequest) -> None:
    """Refuse what a completion cannot have here.

    Raises:
        ApiError: names the field.
    """
    if request.suffix:
        raise ApiError(
            "suffix is not supported: this model only continues text; leave it out", 400, _UNSUPPORTED, "suffix"
        )
    if request.best_of not in (None, request.n):
        raise ApiError(
            f"best_of is {request.best_of}, but this service returns every choice it makes; leave it out, or "
            f"set it to n ({request.n})",
            400,
            _UNSUPPORTED,
            "best_of",
        )
    _check_stream(request)


def check_chat(request: ChatRequest) -> None:
    """Refuse fields of a chat that contradict each other.

    Raises:
        ApiError: names the field.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true; set it, or leave top_logprobs out", param="top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            f"max_tokens is {request.max_tokens}, and max_completion_tokens, its new name, is "
            f"{request.max_completion_tokens}; send one of them",
            param="max_tokens",
        )
    _check_stream(request)


def _check_stream(request: CompletionRequest | ChatRequest) -> None:
    if request.stream_options is None:
        return
    if not request.stream:
        raise ApiError("stream_options needs stream: true; set it, or leave them out", param="stream_options")
    if request.stream_options.include_obfuscation:
        raise ApiError(
            "stream_options.include_obfuscation is not supported: events are as long as what they say; leave it out, "
            "or set it to false",
            400,
            _UNSUPPORTED,
            "stream_options",
        )
