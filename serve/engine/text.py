"""From a growing list of tokens to text that can be sent: whole characters, and never a stop string.

Which tokens come is left to decoding.py."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens before the new text that its first characters may depend on, as the space of SentencePiece does.
_CONTEXT = 6
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
        self._start, self._released = 0, len(self._ids)

    def push(self, token: int) -> str:
        """Take one more token; the text that it completes, which may be empty."""
        self._ids.append(token)
        text = self._pending()
        # A half character decodes to the replacement mark, until its last byte is there.
        if not text or text.endswith(_INCOMPLETE):
            return self._give_up() if len(self._ids) - self._released > _MOST_PENDING else ""
        self._start, self._released = self._released, len(self._ids)
        return text

    def _give_up(self) -> str:
        """What is known of many tokens that end no character, so that they are not decoded again and again."""
        known = self._decode(self._ids[self._start : self._released])
        whole = self._decode(self._ids[self._start :])
        if len(whole) <= len(known):
            # They have no text, as special tokens.
            del self._ids[self._released :]
            return ""
        # No character is longer than four bytes, so that what came before the last tokens is decided.
        for end in range(len(self._ids) - 4, len(self._ids) - 8, -1):
            decided = self._decode(self._ids[self._start : end])
            if whole.startswith(decided):
                self._start, self._released = self._released, end
                return decided[len(known) :]
        return ""

    def flush(self) -> str:
        """The text that waits for a token which never comes."""
        text, self._ids = self._pending(), self._ids[: self._released]
        return text

    def _pending(self) -> str:
        known = self._decode(self._ids[self._start : self._released])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopFilter:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; it and what follows are dropped."""

    def push(self, text: str) -> str:
        """Take more text; what of all the text so far is now sure to be before any stop string."""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops]
        found = [(place + len(stop), place) for place, stop in places if place >= 0]
        if found:
            # The one that was complete first, so that it does not matter in what pieces text comes.
            self.stopped = True
            passed, self._held = self._held[: min(found)[1]], ""
            return passed
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def flush(self) -> str:
        """The text held back, once it is known that no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
