"""One choice of an answer as it grows: its text up to a stop string, and its tokens' log-probabilities.

Which tokens come is left to batching.py, and how an answer is laid out to layout.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from serve.engine.scoring import TokenScore
from serve.engine.text import Detokenizer, StopFilter

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """A stretch of one choice."""

    index: int
    text: str = ""
    scores: tuple[tuple[TokenScore, int], ...] = ()
    """Tokens with where their text starts in the choice's, in characters."""
    reason: Reason | None = None
    """Why the choice ends with this piece; None while it goes on."""

    @property
    def is_silent(self) -> bool:
        """Whether it tells nothing: a token was made whose text is not sure yet."""
        return not (self.text or self.scores or self.reason)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces that follow each other, at least one, as one."""
    scores = tuple(score for piece in pieces for score in piece.scores)
    return replace(pieces[-1], text="".join(piece.text for piece in pieces), scores=scores)


class GrowingChoice:
    """Turns the tokens of one choice into pieces.

    Log-probabilities come with the piece that completes their token's text.

    Args:
        prompt: the tokens before it.
        stops: strings that end it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], index: int, stops: Sequence[str]
    ) -> None:
        self._tokenizer, self._index = tokenizer, index
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._filter = StopFilter(stops)
        self._decoded = self._passed = 0
        """Characters that came from tokens, and those of them that were passed on."""
        self._scores: deque[tuple[TokenScore, int, int]] = deque()
        """Scores to be told, with where their token's text starts and ends."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def echo(self, text: str, scores: Sequence[TokenScore]) -> Piece:
        """The prompt as the beginning of the choice; `text` is what it was written as."""
        reader, placed, place = Detokenizer(self._tokenizer, []), [], 0
        for item in scores:
            placed.append((item, place))
            place += len(reader.push(item.token))
        self._decoded = self._passed = len(text)
        return Piece(self._index, text, tuple(placed))

    def push(self, token: int, score: TokenScore | None = None) -> Piece:
        """Take a token; what is now sure to be told, maybe nothing."""
        text = self._detokenizer.push(token)
        if score is not None:
            self._scores.append((score, self._decoded, self._decoded + len(text)))
        self._decoded += len(text)
        return self._pass_on(self._filter.push(text))

    def finish(self, reason: Reason) -> Piece:
        """The end of the choice, with all that was held back before a stop string."""
        text = "" if self.stopped else self._filter.push(self._detokenizer.flush())
        text += self._filter.flush()
        return replace(self._pass_on(text), reason="stop" if self.stopped else reason)

    def _pass_on(self, text: str) -> Piece:
        self._passed += len(text)
        placed = []
        while self._scores:
            item, start, end = self._scores[0]
            # A token that reaches into a stop string is told if some of its text stands before it.
            if end > self._passed and not (self.stopped and start < self._passed):
                break
            placed.append((item, start))
            self._scores.popleft()
        return Piece(self._index, text, tuple(placed))
