"""Answers completion requests: checks them against the model, decodes, and cuts text into chunks.

Bounding how many run at once is backend.py's part; HTTP and Ray are unknown here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ot_ray.errors import NotFoundError
from serve.engine.choice import GrowingChoice
from serve.engine.decoding import decode
from serve.engine.plug_ins import PlugIn
from serve.engine.residency import PlugInCache
from serve.engine.sampling import Sampler, Sampling
from serve.failures import ApiError, model_not_found
from serve.wire.completions import Choice, CompletionRequest, Usage
from serve.wire.models import ModelCard

# For architectures without learnt positions whose config states no length.
_UNSTATED_CONTEXT = 2048


@dataclass(frozen=True)
class Chunk:
    """A stretch of one choice; the last chunk of a request holds its usage."""

    choice: Choice
    usage: Usage | None = None

    @property
    def is_silent(self) -> bool:
        """Whether it tells nothing: a token was made whose text is not sure yet."""
        choice = self.choice
        return not (choice.text or choice.logprobs or choice.finish_reason or self.usage)


@dataclass(frozen=True)
class Job:
    """A request that fits the model, with its prompts as token ids."""

    request: CompletionRequest
    prompts: list[list[int]]
    texts: list[str]
    """The prompts as text, for `echo`."""
    sampling: Sampling
    seed: int


class GenerationEngine:
    """Generates for the base model and its plug-ins; its methods may be called from any thread.

    Args:
        max_choices: the largest number of choices (prompts times n) of one request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cache: PlugInCache, max_choices: int = 32) -> None:
        self._tokenizer, self._cache, self._max_choices = tokenizer, cache, max_choices
        self._context = context_length(cache.base)
        self._vocabulary = int(cache.base.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, arg-type]
        self._ends = _end_tokens(cache.base, tokenizer)
        self._started = int(time.time())

    def models(self) -> list[ModelCard]:
        """The base model, then every plug-in that may be served.

        Raises:
            OTRayError: the registry cannot be read and never could.
        """
        base = ModelCard(id=self._cache.base_id, created=self._started, owned_by="owner")
        return [base, *map(_card, self._cache.plug_ins())]

    def probe(self) -> None:
        """Make one token with the base model, and raise whatever keeps it from doing so."""
        next(decode(self._cache.base, [min(self._ends, default=0)], Sampler(Sampling(temperature=0), seed=0)))

    def complete(self, request: CompletionRequest) -> Generator[Chunk, None, None]:
        """Answer a request, chunk by chunk, choice after choice.

        Closing the iterator ends the work within one token.

        Raises:
            ApiError: the request does not fit the model, or names one that is not served.
            BusyError: no room for the plug-in became free in time.
        """
        yield from self.generate(self.prepare(request))

    def prepare(self, request: CompletionRequest) -> Job:
        """Check a request and tokenize its prompts; costs no turn of the model.

        Raises:
            ApiError: as `complete`.
        """
        with _not_found_as_answer(request.model):
            self._cache.require(request.model)
        _check_supported(request)
        prompts = self._encode(request)
        if len(prompts) * request.n > self._max_choices:
            raise ApiError(
                f"{len(prompts)} prompts with n={request.n} make {len(prompts) * request.n} choices, but one "
                f"request may have {self._max_choices}; send fewer prompts at a time",
                param="n" if len(prompts) == 1 else "prompt",
            )
        for prompt in prompts:
            self._check_length(len(prompt), request.max_tokens)
        texts = [self._text_of(given, ids) for given, ids in zip(request.prompt or [""], prompts, strict=True)]
        seed = request.seed if request.seed is not None else secrets.randbits(62)
        return Job(request, prompts, texts, self._sampling(request), seed)

    def generate(self, job: Job) -> Generator[Chunk, None, None]:
        """Decode a prepared request; one chunk a token, silent ones included.

        Raises:
            ApiError: the model was withdrawn since the request was prepared.
            BusyError: no room for the plug-in became free in time.
        """
        request, made = job.request, 0
        with _not_found_as_answer(request.model), self._cache.use(request.model) as model:
            last = len(job.prompts) * request.n - 1
            for index in range(last + 1):
                for choice, tokens in self._choice(model, job, index):
                    made += tokens
                    is_last = index == last and choice.finish_reason is not None
                    yield Chunk(choice, _usage(job, made) if is_last else None)

    def _choice(self, model: PreTrainedModel, job: Job, index: int) -> Iterator[tuple[Choice, int]]:
        """One choice in stretches, each with the number of tokens that it took."""
        place = index // job.request.n
        prompt = job.prompts[place]
        growing = GrowingChoice(self._tokenizer, job.request, prompt, index)
        if job.request.echo:
            yield growing.echo(model, job.texts[place]), 0
        steps = decode(model, prompt, Sampler(job.sampling, (job.seed + index) % 2**63))
        for _ in range(job.request.max_tokens):
            token, logits_V = next(steps)
            if token in self._ends:
                yield growing.finish("stop"), 1
                return
            yield growing.push(token, logits_V), 1
            if growing.stopped:
                break
        yield growing.finish("length"), 0

    def _encode(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of every prompt; an empty prompt is the beginning of a document."""
        prompts: list[list[int]] = []
        for prompt in request.prompt or [""]:
            ids = list(self._tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt  # type: ignore
            wrong = [token for token in ids if not 0 <= token < self._vocabulary]
            if wrong:
                raise ApiError(
                    f"prompt holds the token id {wrong[0]}; this model's are 0..{self._vocabulary - 1}", param="prompt"
                )
            prompts.append(ids or [self._beginning()])
        return prompts

    def _beginning(self) -> int:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        raise ApiError("prompt is empty, and this model has no token to begin with; send a prompt", param="prompt")

    def _text_of(self, given: str | list[int], ids: list[int]) -> str:
        if isinstance(given, str):
            return given
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _check_length(self, prompt: int, max_tokens: int) -> None:
        if prompt + max_tokens > self._context:
            raise ApiError(
                f"This model's maximum context length is {self._context} tokens, however you requested "
                f"{prompt + max_tokens} tokens ({prompt} in your prompt; {max_tokens} for the completion). "
                "Please reduce your prompt; or completion length.",
                code="context_length_exceeded",
            )

    def _sampling(self, request: CompletionRequest) -> Sampling:
        bias = {int(token): value for token, value in request.logit_bias.items()}
        if wrong := [token for token in bias if token >= self._vocabulary]:
            raise ApiError(
                f"logit_bias names the token id {wrong[0]}; this model's are 0..{self._vocabulary - 1}",
                param="logit_bias",
            )
        return Sampling(request.temperature, request.top_p, request.presence_penalty, request.frequency_penalty, bias)


def context_length(model: PreTrainedModel) -> int:
    """Largest number of tokens, prompt and completion together, that a model can attend to."""
    names = ("max_position_embeddings", "n_positions", "seq_length")
    lengths = (getattr(model.config, name, None) for name in names)
    return next((length for length in lengths if isinstance(length, int)), _UNSTATED_CONTEXT)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion: those of the generation config, and the tokenizer's own."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    tokens = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    return frozenset(token for token in tokens if isinstance(token, int))


def _check_supported(request: CompletionRequest) -> None:
    if request.suffix:
        raise ApiError("suffix is not supported: this model only continues text; leave it out", param="suffix")
    if request.best_of not in (None, request.n):
        raise ApiError(
            f"best_of is {request.best_of}, but this service returns every choice it makes; leave it out, or "
            f"set it to n ({request.n})",
            param="best_of",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options needs stream: true; set it, or leave them out", param="stream_options")


def _card(plug_in: PlugIn) -> ModelCard:
    return ModelCard(id=plug_in.model_id, created=plug_in.created, owned_by=plug_in.owner)


def _usage(job: Job, made: int) -> Usage:
    given = sum(len(prompt) for prompt in job.prompts)
    return Usage(prompt_tokens=given, completion_tokens=made, total_tokens=given + made)


@contextmanager
def _not_found_as_answer(model_id: str) -> Iterator[None]:
    try:
        yield
    except NotFoundError:
        raise model_not_found(model_id) from None
