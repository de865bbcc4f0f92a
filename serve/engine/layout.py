"""How pieces of an answer look on the wire: OpenAI's completions, and OpenAI's chat.

What the pieces hold is choice.py's part."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from serve.engine.choice import Piece, Reason
from serve.engine.scoring import TokenScore
from serve.wire.base import Usage
from serve.wire.chat import ChatLogprobs, ScoredToken, TokenLogprob
from serve.wire.completions import Choice, Logprobs


@dataclass(frozen=True)
class Chunk:
    """A stretch of one choice of a completion; the last chunk of a request holds its usage."""

    choice: Choice
    usage: Usage | None = None


@dataclass(frozen=True)
class ChatChunk:
    """A stretch of one choice of a chat; the last chunk of a request holds its usage."""

    index: int
    content: str
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None
    usage: Usage | None = None


class Layout:
    """Lays pieces out for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def completion(self, piece: Piece, usage: Usage | None) -> Chunk:
        """As `POST /v1/completions` answers."""
        logprobs = Logprobs()
        for item, place in piece.scores:
            logprobs.tokens.append(self._name(item.token))
            logprobs.token_logprobs.append(item.logprob)
            logprobs.top_logprobs.append(self._top(item))
            logprobs.text_offset.append(place)
        choice = Choice(
            index=piece.index,
            text=piece.text,
            logprobs=logprobs if logprobs.tokens else None,
            finish_reason=piece.reason,
        )
        return Chunk(choice, usage)

    def chat(self, piece: Piece, usage: Usage | None) -> ChatChunk:
        """As `POST /v1/chat/completions` answers."""
        content = [
            ScoredToken(
                **self._scored(item.token, item.logprob or 0.0).model_dump(),
                top_logprobs=[self._scored(token, logprob) for token, logprob in item.top.items()],
            )
            for item, _ in piece.scores
        ]
        logprobs = ChatLogprobs(content=content) if content else None
        return ChatChunk(piece.index, piece.text, logprobs, piece.reason, usage)

    def _top(self, item: TokenScore) -> dict[str, float] | None:
        if item.logprob is None:
            return None
        # Different tokens may have the same text, as halves of characters do; the likelier one is told. The token
        # itself is always among them where any are asked for.
        top: dict[str, float] = {}
        for token, logprob in {**item.top, item.token: item.logprob}.items() if item.top else ():
            top.setdefault(self._name(token), logprob)
        return top

    def _scored(self, token: int, logprob: float) -> TokenLogprob:
        name = self._name(token)
        # Part of a character has no text that bytes could be read from.
        data = None if "\ufffd" in name else list(name.encode())
        return TokenLogprob(token=name, logprob=logprob, bytes=data)

    def _name(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
