"""Answers requests: checks them against the model, lays them out as jobs, and hands them to the batch.

Running jobs is batching.py's part; HTTP and Ray are unknown here."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from ot_ray.data import render
from ot_ray.errors import DataError, NotFoundError
from serve.engine.admission import BatchLimits
from serve.engine.batch import Batch
from serve.engine.batching import Batcher, EngineStats
from serve.engine.canary import CanaryReport, compare
from serve.engine.checks import check_chat, check_supported, context_length, end_tokens, seed_of
from serve.engine.choice import GrowingChoice
from serve.engine.job import BEGUN, Job, Ticket, Told
from serve.engine.layout import Chunk, Layout
from serve.engine.plug_ins import PlugIn
from serve.engine.residency import PlugInCache
from serve.engine.sampling import Sampling
from serve.failures import ApiError, BusyError, model_not_found
from serve.wire.chat import ChatRequest
from serve.wire.completions import CompletionRequest
from serve.wire.models import ModelCard

# Below it the likeliest token is as good as certain, and logits over it would soon be more than a float holds.
_COLDEST = 1e-5


class GenerationEngine:
    """Generates for the base model and its plug-ins; its methods may be called from any thread.

    Args:
        max_choices: the largest number of choices (prompts times n) of one request.
        wait_s: seconds that a request waits for its turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cache: PlugInCache,
        max_choices: int = 32,
        limits: BatchLimits | None = None,
        wait_s: float = 60.0,
    ) -> None:
        self._tokenizer, self._cache, self._max_choices, self._wait_s = tokenizer, cache, max_choices, wait_s
        self._context = context_length(cache.base)
        self._vocabulary = int(cache.base.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, arg-type]
        self._batch = Batch(cache.many, end_tokens(cache.base, tokenizer))
        self._batcher = Batcher(self._batch, cache, limits or BatchLimits(), self._start_choice)
        self.layout = Layout(tokenizer)
        self._started = int(time.time())

    def models(self, tenant: str | None = None) -> list[ModelCard]:
        """The base model, then every plug-in that may be served, of one tenant or of all.

        Raises:
            OTRayError: the registry cannot be read and never could.
        """
        return [self._base_card(), *map(_card, self._cache.plug_ins(tenant))]

    def _base_card(self) -> ModelCard:
        return ModelCard(id=self._cache.base_id, created=self._started, owned_by="owner")

    def find_model(self, name: str) -> ModelCard:
        """One model, by its id or alias; the card has the name that was asked for.

        Raises:
            ApiError: no such model is served.
        """
        with _not_found_as_answer(name):
            record = self._cache.find(name)
        return self._base_card() if record is None else _card(record).model_copy(update={"id": name})

    def probe(self) -> Future[None]:
        """Have the batch's thread compute the base model's logits; fails with whatever keeps it from doing so."""

        def look() -> None:
            if not self._batch.logits_of(0, torch.tensor([[0]])).isfinite().all():
                raise ApiError("The base model computes values that are not finite.", 503, "model_not_finite")

        return self._batcher.call(look)

    def canary(self, model_id: str) -> CanaryReport:
        """Compare a plug-in, in service or not, with the base model on a fixed text.

        Raises:
            NotFoundError: no such plug-in.
            SplitError: its tensors do not fit the base model.
        """
        model = self._cache.candidate(model_id)
        return self._batcher.call(lambda: compare(self._cache.base, model, self._tokenizer)).result()

    def stats(self) -> EngineStats:
        """What the engine does at the moment."""
        return self._batcher.stats()

    def submit(self, job: Job, tell: Callable[[Told], None], asker: str = "") -> Ticket:
        """Queue a prepared job; `tell` hears the answer, as `Ticket` says.

        Raises:
            ApiError: 429, too many requests wait.
        """
        return self._batcher.submit(job, tell, asker)

    def complete(self, request: CompletionRequest) -> Generator[Chunk, None, None]:
        """Answer a request, chunk by chunk; choices come as they grow, side by side.

        Closing the iterator ends the work within one token.

        Raises:
            ApiError: the request does not fit the model, or names one that is not served.
            BusyError: the request did not get its turn in time.
        """
        yield from self.generate(self.prepare(request))

    def generate(self, job: Job) -> Generator[Chunk, None, None]:
        """Carry out a prepared job.

        Raises:
            ApiError: the model was withdrawn since, or cannot compute.
            BusyError: it did not get its turn in time.
        """
        news: queue.Queue[Told] = queue.Queue()
        ticket = self.submit(job, news.put)
        try:
            told = self._first(news)
            while True:
                if isinstance(told, BaseException):
                    raise told
                if told is not BEGUN:
                    chunk = self.layout.completion(*told)  # type: ignore[misc]
                    yield chunk
                    if chunk.usage is not None:
                        return
                told = news.get()
        finally:
            ticket.cancel()

    def _first(self, news: queue.Queue[Told]) -> Told:
        try:
            return news.get(timeout=self._wait_s)
        except queue.Empty:
            raise self.too_late() from None

    def too_late(self) -> BusyError:
        """What a request hears that did not get its turn."""
        stats = self.stats()
        return BusyError(
            f"{stats.rows} choices and {stats.waiting} requests were ahead for {self._wait_s:g} s; try again later"
        )

    def prepare(self, request: CompletionRequest) -> Job:
        """Check a request and tokenize its prompts; costs no turn of the model.

        Raises:
            ApiError: as `complete`.
        """
        plug_in = self._plug_in(request.model)
        check_supported(request)
        prompts = self._encode(request)
        self._check_choices(len(prompts), request.n)
        for prompt in prompts:
            self._check_length(len(prompt), request.max_tokens)
        return Job(
            model=request.model,
            plug_in=plug_in,
            prompts=prompts,
            texts=[self._text_of(given, ids) for given, ids in zip(request.prompt or [""], prompts, strict=True)],
            n=request.n,
            max_tokens=request.max_tokens,
            sampling=self._sampling(request),
            seed=seed_of(request.seed),
            stops=request.stop,
            top=request.logprobs,
            echo=request.echo,
            stream=request.stream,
        )

    def prepare_chat(self, request: ChatRequest) -> Job:
        """Check a chat request and lay its conversation out as training does; costs no turn of the model.

        Raises:
            ApiError: the request does not fit the model, or names one that is not served.
        """
        plug_in = self._plug_in(request.model)
        check_chat(request)
        self._check_choices(1, request.n)
        try:
            said = [{"role": message.role, "content": message.text} for message in request.messages]
            text = render(said, self._tokenizer, reply=True)
        except DataError as error:
            raise ApiError(str(error), param="messages") from None
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        prompt = ids or [self._beginning("messages")]
        asked = request.max_completion_tokens or request.max_tokens
        self._check_length(len(prompt), asked or 1)
        return Job(
            model=request.model,
            plug_in=plug_in,
            prompts=[prompt],
            texts=[text],
            n=request.n,
            max_tokens=asked or self._context - len(prompt),
            sampling=self._sampling(request),
            seed=seed_of(request.seed),
            stops=request.stop,
            top=(request.top_logprobs or 0) if request.logprobs else None,
            stream=request.stream,
        )

    def _plug_in(self, name: str) -> PlugIn | None:
        with _not_found_as_answer(name):
            return self._cache.find(name)

    def _start_choice(self, job: Job, index: int) -> GrowingChoice:
        return GrowingChoice(self._tokenizer, job.prompts[index // job.n], index, job.stops)

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts * n > self._max_choices:
            raise ApiError(
                f"{prompts} prompts with n={n} make {prompts * n} choices, but one request may have "
                f"{self._max_choices}; send fewer prompts at a time",
                param="n" if prompts == 1 else "prompt",
            )

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

    def _beginning(self, param: str = "prompt") -> int:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        raise ApiError(f"{param} is empty, and this model has no token to begin with; send text", param=param)

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

    def _sampling(self, request: CompletionRequest | ChatRequest) -> Sampling:
        bias = {int(token): value for token, value in request.logit_bias.items()}
        if wrong := [token for token in bias if token >= self._vocabulary]:
            raise ApiError(
                f"logit_bias names the token id {wrong[0]}; this model's are 0..{self._vocabulary - 1}",
                param="logit_bias",
            )
        temperature = request.temperature if request.temperature >= _COLDEST else 0.0
        return Sampling(temperature, request.top_p, request.presence_penalty, request.frequency_penalty, bias)


def _card(plug_in: PlugIn) -> ModelCard:
    return ModelCard(id=plug_in.model_id, created=plug_in.created, owned_by=plug_in.owner)


@contextmanager
def _not_found_as_answer(model_id: str) -> Iterator[None]:
    try:
        yield
    except NotFoundError:
        raise model_not_found(model_id) from None
