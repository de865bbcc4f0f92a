"""One choice of a completion as it grows: its text up to a stop string, and its tokens' log-probabilities.

Which tokens come is left to decoding.py, and how many to generation.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serve.engine.decoding import TokenScore, score, score_prompt
from serve.engine.text import Detokenizer, StopFilter
from serve.wire.completions import Choice, CompletionRequest, Logprobs


class GrowingChoice:
    """Turns the tokens of one choice into stretches of OpenAI's `Choice`.

    Log-probabilities come with the stretch that completes their token's text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, request: CompletionRequest, prompt: Sequence[int], index: int
    ) -> None:
        self._tokenizer, self._prompt, self._index = tokenizer, prompt, index
        self._top = request.logprobs
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._filter = StopFilter(request.stop)
        self._decoded = self._passed = 0
        """Characters that came from tokens, and those of them that were passed on."""
        self._scores: list[tuple[TokenScore, int, int]] = []
        """Scores to be told, with where their token's text starts and ends."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def echo(self, model: PreTrainedModel, text: str) -> Choice:
        """The prompt as the beginning of the choice; `text` is what it was written as."""
        scores = score_prompt(model, self._prompt, self._top) if self._top is not None else []
        reader = Detokenizer(self._tokenizer, [])
        logprobs, place = Logprobs(), 0
        for item in scores:
            logprobs.extend(self._logprobs(item, place))
            place += len(reader.push(item.token))
        self._decoded = self._passed = len(text)
        return self._choice(text, logprobs)

    def push(self, token: int, logits_V: torch.Tensor) -> Choice:
        """Take a token with the logits it was chosen from; what is now sure to be told, maybe nothing."""
        text = self._detokenizer.push(token)
        if self._top is not None:
            self._scores.append((score(token, logits_V, self._top), self._decoded, self._decoded + len(text)))
        self._decoded += len(text)
        return self._pass_on(self._filter.push(text))

    def finish(self, reason: Literal["stop", "length"]) -> Choice:
        """The end of the choice, with all that was held back before a stop string."""
        text = "" if self.stopped else self._filter.push(self._detokenizer.flush())
        text += self._filter.flush()
        choice = self._pass_on(text)
        return choice.model_copy(update={"finish_reason": "stop" if self.stopped else reason})

    def _pass_on(self, text: str) -> Choice:
        self._passed += len(text)
        logprobs, waiting = Logprobs(), []
        for item, start, end in self._scores:
            # A token that reaches into a stop string is told if some of its text stands before it.
            if end <= self._passed or (self.stopped and start < self._passed):
                logprobs.extend(self._logprobs(item, start))
            else:
                waiting.append((item, start, end))
        self._scores = waiting
        return self._choice(text, logprobs)

    def _choice(self, text: str, logprobs: Logprobs) -> Choice:
        return Choice(index=self._index, text=text, logprobs=logprobs if logprobs.tokens else None)

    def _logprobs(self, item: TokenScore, place: int) -> Logprobs:
        # Different tokens may have the same text, as halves of characters do; the likelier one is told.
        top: dict[str, float] = {}
        for token, logprob in item.top.items():
            top.setdefault(self._name(token), logprob)
        return Logprobs(
            tokens=[self._name(item.token)],
            token_logprobs=[item.logprob],
            top_logprobs=[top if item.logprob is not None else None],
            text_offset=[place],
        )

    def _name(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
