"""Documents to token ids, with a mark on every token that enters the loss.

Laying out chats is chat.py's part; cutting and padding to a length is `packing`'s."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ot_ray.data.chat import render
from ot_ray.data.examples import Conversation, Document, Message, Segment
from ot_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenSpan:
    """One tokenised document of n tokens."""

    input_ids: list[int]
    learn: list[bool]
    """n flags: whether predicting this token enters the loss."""

    splittable: bool = True
    """Whether the packer may cut it over sequences (plain text) or not (prompts, chats)."""

    cut: int = 0
    """Tokens that were dropped on the right."""


def tokenize(document: Document, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenSpan:
    """Tokenise a document as one text, so that its tokens are those the model meets when it is used.

    Text and completions end in the tokenizer's end-of-sequence token, which is learnt; a chat ends as its
    template ends it. In chats, what the assistant says and the token that ends its turn are learnt. A
    token that straddles a border is learnt if any of its characters is.

    Args:
        max_length: tokens; prompts with completions and chats are cut on the right to this length.
            Plain text is not cut: the packer splits it.

    Raises:
        DataError: the tokenizer has no end-of-sequence token or no character offsets, or its template
            cannot lay out this conversation.
    """
    chat = isinstance(document, Conversation)
    segments = _lay_out(document, tokenizer) if chat else document.segments
    splittable = not chat and document.splittable
    ids, learn = _joint_tokens(segments, tokenizer, add_special_tokens=not chat)
    if not chat:
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise DataError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
        if ids and ids[-1] == eos:
            ids, learn = ids[:-1], learn[:-1]
        ids, learn = [*ids, eos], [*learn, any(learn)]
    if splittable or len(ids) <= max_length:
        return TokenSpan(ids, learn, splittable)
    return TokenSpan(ids[:max_length], learn[:max_length], splittable, cut=len(ids) - max_length)


def _joint_tokens(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> tuple[list[int], list[bool]]:
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, which tell prompts from answers; "
            "use a tokenizer with a tokenizer.json"
        )
    encoded = tokenizer(
        "".join(segment.text for segment in segments),
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    return list(encoded["input_ids"]), _learnt(encoded["offset_mapping"], segments)


def _learnt(offsets: Sequence[tuple[int, int]], segments: Sequence[Segment]) -> list[bool]:
    """Which tokens hold a character that is learnt; both lists run from left to right."""
    ends = list(accumulate(len(segment.text) for segment in segments))
    stretches = [
        (end - len(segment.text), end)
        for segment, end in zip(segments, ends, strict=True)
        if segment.learn and segment.text
    ]
    learn, previous, current = [], 0, 0
    for start, end in offsets:
        # Some tokenizers leave leading spaces out of a token's offsets; they lie before it all the same.
        start = min(start, previous)
        previous = max(previous, end)
        while current < len(stretches) and stretches[current][1] <= start:
            current += 1
        learn.append(current < len(stretches) and end > max(start, stretches[current][0]))
    return learn


def _lay_out(chat: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The rendered chat, cut where learning starts and stops."""
    text = _render(chat.messages, tokenizer, chat.where)
    segments, done = [], 0
    for start, end in _turns(chat, text, tokenizer):
        segments += [Segment(text[done:start], False), Segment(text[start:end], True)]
        done = end
    return [*segments, Segment(text[done:], False)]


def _turns(chat: Conversation, text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Where each learnt turn stands in the rendered `text`: its content and the token that ends it.

    A marker is rendered in the content's place; what then stands before and after the marker stands
    before and after the content. This holds for templates that trim or rewrite what a turn says.
    """
    marker = "[[assistant]]"
    while marker in text:
        marker = f"[{marker}]"
    closing = _closing(tokenizer)
    for index, message in enumerate(chat.messages):
        if not message.learn:
            continue
        marked = list(chat.messages)
        marked[index] = Message(message.role, marker, learn=True)
        before, found, after = _render(marked, tokenizer, chat.where).partition(marker)
        start, stop = len(before), len(text) - len(after)
        if not found or stop < start or not (text.startswith(before) and text.endswith(after)):
            raise DataError(
                f"{chat.where}: the chat template does not show what the assistant says in "
                f"messages[{index}] at one place; use a template that does, or prompt and completion"
            )
        ending = closing.match(after)
        yield start, stop + (ending.end() if ending else 0)


def _closing(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What ends a turn: one of the tokenizer's added tokens, or else the blank space after the content."""
    # Every tokenizer has this method; only the base class's annotations do not know it.
    vocabulary: dict[str, int] = tokenizer.get_added_vocab()  # type: ignore
    added = sorted(vocabulary, key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, added))})?") if added else re.compile(r"\s*")


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    return render([{"role": message.role, "content": message.content} for message in messages], tokenizer, where)
