"""Training data before a job is queued: every line checked, errors with their line, tokens counted as training will.

Reads a stream line by line; where the file lies, and what becomes of the report, is left to the controller."""

from __future__ import annotations

import codecs
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pydantic import Field

from ot_ray.config import Config
from ot_ray.data.examples import Conversation, Document, parse_row, shape_of
from ot_ray.data.load import check_length, pad_id, teaches
from ot_ray.data.packing import IGNORE, PackedSequence, packing
from ot_ray.data.tokens import TokenSpan, tokenize
from ot_ray.errors import DataError
from serve.controller.training_rows import RowError, read_row
from serve.controller.validation_report import LineError, ValidationReport
from serve.wire.paging import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = "text"
_SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
_TOOLS = frozenset({"tools", "functions", "function_call", "tool_choice", "parallel_tool_calls"})
_MOST_MESSAGE, _MOST_REMEMBERED, _MOST_KEYS = 300, 500_000, 10
_PACKED_FILES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}


class ValidationRules(Config):
    """What a file of training data must be like."""

    length: int = Field(ge=2)
    """Tokens of a training sequence; chats and prompts that are longer are cut there."""
    file: Literal["training_file", "validation_file"] = "training_file"
    """Which of a job's files it is."""
    min_examples: int = Field(10, ge=1)
    """Fewest examples that something is learnt of."""
    max_errors: int = Field(50, ge=1)
    """Errors after which reading stops."""
    max_line_bytes: int = Field(2**20, ge=1024)
    """Longest line."""
    max_messages: int = Field(1000, ge=1)
    """Most messages of one conversation; each of the assistant's is laid out by the template once."""
    max_seconds: float = Field(3600.0, gt=0)
    """Longest time that reading may take."""


def validate(
    source: Path | BinaryIO,
    tokenizer: PreTrainedTokenizerBase,
    rules: ValidationRules,
    progress: Callable[[int], None] | None = None,
) -> ValidationReport:
    """Check a file of JSON lines and count what training on it takes.

    A file without errors is one that `ot_ray.data.load_sequences` reads, with the same counts. Examples that are longer
    than a sequence are cut, and counted as truncated; those of which nothing learnt is left are left out, and counted
    as dropped. Blank lines are skipped. Neither the file nor its examples are held in memory.

    Args:
        source: the file, or a stream of its bytes.
        progress: called with the bytes of each line that was read.

    Raises:
        ConfigError: the tokenizer's model does not take sequences of `rules.length` tokens.
    """
    check_length(rules.length, tokenizer)
    reading = _Reading(tokenizer, rules, progress)
    opened: AbstractContextManager[BinaryIO] = source.open("rb") if isinstance(source, Path) else nullcontext(source)
    with opened as stream:
        for sequence in packing(reading.spans(stream), rules.length, pad_id(tokenizer)):
            reading.count(sequence)
    return reading.report()


class _Reading:
    """One pass over a file, and what was found on it so far."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rules: ValidationRules, progress: Callable[[int], None] | None
    ) -> None:
        self._tokenizer, self._rules, self._progress = tokenizer, rules, progress
        self._errors: list[LineError] = []
        self._stopped = False
        self._counts: Counter[str] = Counter()
        self._longest = 0
        self._unread: set[str] = set()
        self._seen: set[int] = set()
        self._deadline = time.monotonic() + rules.max_seconds

    def spans(self, stream: BinaryIO) -> Iterator[TokenSpan]:
        """The tokens of every example that something is learnt of."""
        for number, line in _lines(stream, self._rules.max_line_bytes):
            if self._is_over(number):
                return
            try:
                span = self._span(number, line)
            except (RowError, DataError) as error:
                message = str(error).removeprefix(f"Line {number}: ")
                self._errors.append(LineError(number, f"Line {number}: {shown(message, _MOST_MESSAGE)}"))
            else:
                if span is not None:
                    yield span
            if self._progress:
                self._progress(len(line or b""))

    def count(self, sequence: PackedSequence) -> None:
        """Add up a finished training sequence."""
        self._counts["sequences"] += 1
        self._counts["tokens"] += int(sequence.real.sum())
        self._counts["learnable_tokens"] += int((sequence.labels != IGNORE).sum())

    def report(self) -> ValidationReport:
        """What was found."""
        fields = ("examples", "tokens", "learnable_tokens", "sequences", "truncated", "cut_tokens", "dropped")
        return ValidationReport(
            file=self._rules.file,
            min_examples=self._rules.min_examples,
            length=self._rules.length,
            **{name: self._counts[name] for name in fields},
            duplicates=self._counts["duplicates"],
            longest=self._longest,
            unread_keys=tuple(sorted(self._unread)),
            errors=tuple(self._errors),
            stopped=self._stopped,
        )

    def _is_over(self, number: int) -> bool:
        if len(self._errors) >= self._rules.max_errors:
            self._stopped = True
        elif time.monotonic() > self._deadline:
            text = f"reading took longer than {self._rules.max_seconds:g} seconds; split the file"
            self._errors.append(LineError(number, f"Line {number}: {text}"))
            self._stopped = True
        return self._stopped

    def _span(self, number: int, line: bytes | None) -> TokenSpan | None:
        if line is None:
            raise RowError(f"longer than {self._rules.max_line_bytes} bytes; write each example on a line of its own")
        if number == 1:
            for magic, kind in _PACKED_FILES.items():
                if line.startswith(magic):
                    raise RowError(f"the file is compressed ({kind}); upload it unpacked")
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            return None
        document = self._document(read_row(line), f"Line {number}")
        span = tokenize(document, self._tokenizer, self._rules.length)
        if not teaches(span):
            if not span.cut:
                raise RowError("there is nothing to learn: what is to be learnt is empty, or has weight 0")
            self._counts["dropped"] += 1
            return None
        self._note(document, span)
        return span

    def _document(self, row: Any, where: str) -> Document:
        if not isinstance(row, Mapping):
            raise RowError(f"not an object; write one of {_SHAPES}")
        shape = shape_of(row, _TEXT)
        if shape is None:
            found = ", ".join(sorted(map(repr, row))) or "no keys"
            raise RowError(f"found {found}; write one of {_SHAPES}")
        others = set(row).difference(shape)
        if others & _TOOLS:
            raise RowError(f"{', '.join(sorted(others & _TOOLS))}: tools are not tuned; leave them out")
        for key in others:
            if len(self._unread) < _MOST_KEYS:
                self._unread.add(shown(key, 40))
        if isinstance(row.get("messages"), list) and len(row["messages"]) > self._rules.max_messages:
            raise RowError(f"has {len(row['messages'])} messages; use at most {self._rules.max_messages}")
        document = parse_row(row, _TEXT, where)
        if isinstance(document, Conversation) and document.messages[-1].role != "assistant":
            raise RowError(f"the last message is the {document.messages[-1].role}'s; end with the assistant's")
        return document

    def _note(self, document: Document, span: TokenSpan) -> None:
        self._counts["examples"] += 1
        self._counts["truncated"] += span.cut > 0
        self._counts["cut_tokens"] += span.cut
        self._longest = max(self._longest, len(span.input_ids) + span.cut)
        key = hash(document.messages if isinstance(document, Conversation) else document.segments)
        if key in self._seen:
            self._counts["duplicates"] += 1
        elif len(self._seen) < _MOST_REMEMBERED:
            self._seen.add(key)


def _lines(stream: BinaryIO, most: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines with their numbers, from 1; None for one of more than `most` bytes, which is never held whole."""
    number = 0
    while line := stream.readline(most + 1):
        number += 1
        if len(line) <= most or line.endswith(b"\n"):
            yield number, line
            continue
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(most)
        yield number, None
