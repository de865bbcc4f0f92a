"""What one document is before it is tokenised, and how a JSON object or table row becomes one.

Which files hold the rows is `documents`' and `readers`' business; tokens are `tokens`'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ot_ray.errors import DataError

SHAPES = (
    '{"<text_field>": ...} (plain text), {"prompt": ..., "completion": ...} or '
    '{"messages": [{"role": ..., "content": ...}, ...]}'
)
ROLES = ("system", "developer", "user", "assistant")
_MESSAGE_KEYS = {"role", "content", "weight"}


@dataclass(frozen=True)
class Segment:
    """A stretch of text; `learn` says whether its tokens enter the loss."""

    text: str
    learn: bool


@dataclass(frozen=True)
class Example:
    """Consecutive segments of one document. Plain text is one segment that is learnt."""

    segments: tuple[Segment, ...]
    where: str = "the example"
    """File and line, for error messages."""

    @property
    def splittable(self) -> bool:
        """Whether the packer may cut it over sequences: all of it is learnt, so no prompt is lost."""
        return all(segment.learn for segment in self.segments)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `learn` is true on the assistant's turns of weight 1."""

    role: str
    content: str
    learn: bool


@dataclass(frozen=True)
class Conversation:
    """A chat; it stays in messages until a tokenizer's chat template lays it out."""

    messages: tuple[Message, ...]
    where: str = "the conversation"
    """File and line, for error messages."""


Document = Example | Conversation


def shape_of(keys: Iterable[str], text_field: str) -> tuple[str, ...] | None:
    """The columns that make up a document, or None; where several shapes fit, chat goes first, then
    prompt and completion."""
    present = set(keys)
    for shape in (("messages",), ("prompt", "completion"), (text_field,)):
        if present.issuperset(shape):
            return shape
    return None


def parse_row(row: Any, text_field: str, where: str) -> Document:
    """Make a document of one JSON value or table row.

    Args:
        row: `{text_field}`, `{"prompt", "completion"}` or OpenAI's `{"messages"}`; other keys are
            ignored.
        where: file and line, for error messages.

    Raises:
        DataError: no object, none of the three shapes, a field of the wrong type, an unknown role or
            message key, or a conversation in which the assistant says nothing.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: found {_kind(row)}, not an object; write one of {SHAPES}")
    shape = shape_of(row, text_field)
    if shape is None:
        raise DataError(f"{where}: found {_listed(row)}; write one of {SHAPES}, or set data.text_field")
    if shape == ("messages",):
        return _conversation(row["messages"], where)
    texts = [_text(row[name], name, where) for name in shape]
    if len(shape) == 1:
        return Example((Segment(texts[0], True),), where)
    return Example((Segment(texts[0], False), Segment(texts[1], True)), where)


def _conversation(messages: Any, where: str) -> Conversation:
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages is {_kind(messages)}; write a list of messages")
    parsed = tuple(_message(item, f"messages[{index}]", where) for index, item in enumerate(messages))
    if not any(message.role == "assistant" for message in parsed):
        raise DataError(f"{where}: no assistant message among {len(parsed)}; there is nothing to learn")
    return Conversation(parsed, where)


def _message(item: Any, name: str, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f'{where}: {name} is {_kind(item)}; write {{"role": ..., "content": ...}}')
    # Tables fill the fields that a message does not have with nulls.
    unknown = [key for key, value in item.items() if key not in _MESSAGE_KEYS and value is not None]
    if unknown:
        raise DataError(
            f"{where}: {name} has {_listed(unknown)}, which training does not read; keep role, content and weight"
        )
    role = _text(item.get("role"), f"{name}.role", where)
    if role not in ROLES:
        raise DataError(f"{where}: {name}.role is {role!r}; use one of {', '.join(ROLES)}")
    weight = item.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{where}: {name}.weight is {weight!r}; use 0 or 1")
    content = _text(item.get("content"), f"{name}.content", where)
    return Message(role, content, learn=role == "assistant" and weight != 0)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_kind(value)}; write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = value[error.start]
        raise DataError(
            f"{where}: {name} holds half of a surrogate pair, {broken!r}, at character {error.start + 1}; "
            "write the whole character"
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return names.get(type(value), f"a {type(value).__name__}")


def _listed(keys: Iterable[str]) -> str:
    names = ", ".join(sorted(map(repr, keys)))
    return f"the keys {names}" if names else "an object without keys"
