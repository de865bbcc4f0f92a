"""From a growing list of tokens to text that can be sent: whole characters, and never a stop string.

Which tokens come is left to batch.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens before the new text that its first characters may depend on, as the space of SentencePiece does.
_CONTEXT = 6
# Tokens that are decoded again with each new one, before those that their text needs no more are let go.
_WINDOW = 16
# Tokens that may wait for the end of a character.
_MOST_PENDING = 64
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Decodes tokens as they come; a character of several tokens is released with its last one.

    Args:
        context: the prompt's tokens; their text is not released.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])
        self._released = len(self._ids)
        """How many tokens have told their text."""
        self._known = self._decode(self._ids)
        """Their text."""

    def push(self, token: int) -> str:
        """Take one more token; the text that it completes, which may be empty."""
        self._ids.append(token)
        whole = self._decode(self._ids)
        # A half character decodes to the replacement mark, until its last byte is there.
        if len(whole) > len(self._known) and not whole.endswith(_INCOMPLETE):
            return self._release(len(self._ids), whole)
        return self._give_up(whole) if len(self._ids) - self._released > _MOST_PENDING else ""

    def _give_up(self, whole: str) -> str:
        """What is known of many tokens that end no character, so that they are not decoded again and again."""
        if len(whole) <= len(self._known):
            # They have no text, as special tokens.
            del self._ids[self._released :]
            return ""
        # No character is longer than four bytes, so that what came before the last tokens is decided.
        for end in range(len(self._ids) - 4, len(self._ids) - 8, -1):
            decided = self._decode(self._ids[:end])
            if whole.startswith(decided):
                return self._release(end, decided)
        return ""

    def _release(self, end: int, whole: str) -> str:
        """Tell the text of the tokens up to a place at which a character ends."""
        text, before = whole[len(self._known) :], self._released
        self._known, self._released = whole, end
        if before >= _WINDOW:
            # Only where a character ends can those before be left out.
            self._ids, self._released = self._ids[before:], end - before
            self._known = self._decode(self._ids[: self._released])
        return text

    def flush(self) -> str:
        """The text that waits for a token which never comes."""
        text = self._decode(self._ids)[len(self._known) :]
        del self._ids[self._released :]
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopFilter:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one.

    Every letter is looked at a bounded number of times on average, however stop strings repeat themselves.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matches = [_Match(stop) for stop in stops]
        self._held: deque[str] = deque()
        self.stopped = False
        """Whether a stop string has come; it and what follows are dropped."""

    def push(self, text: str) -> str:
        """Take more text; what of all the text so far is now sure to be before any stop string."""
        if not self._matches:
            return text
        for letter in text:
            self._held.append(letter)
            # All are moved on, and of those that end here the longest counts: the first one that is complete decides,
            # so that it does not matter in what pieces text comes.
            ended = [len(match.stop) for match in self._matches if match.push(letter)]
            if ended:
                self.stopped = True
                passed = self._passed(max(ended))
                self._held.clear()
                return passed
        return self._passed(max(match.size for match in self._matches))

    def flush(self) -> str:
        """The text held back, once it is known that no more comes."""
        return self._passed(0)

    def _passed(self, keep: int) -> str:
        return "".join(self._held.popleft() for _ in range(len(self._held) - keep))


class _Match:
    """How much of a stop string the text ends with, letter by letter (Knuth, Morris and Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop, self.size = stop, 0
        # Of the first n letters of the stop string: how many at their end are its beginning too. As long as was needed
        # so far, since nobody says how long a stop string is.
        self._borders = [0, 0]

    def push(self, letter: str) -> bool:
        """Take one more letter, before the stop string is whole; whether it is whole now."""
        self.size = self._next(self.size, letter)
        if self.size == len(self._borders):
            self._borders.append(self._next(self._borders[-1], letter))
        return self.size == len(self.stop)

    def _next(self, size: int, letter: str) -> int:
        while size and self.stop[size] != letter:
            size = self._borders[size]
        return size + 1 if self.stop[size] == letter else 0
