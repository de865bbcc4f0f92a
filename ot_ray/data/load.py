"""From a data source to packed sequences in one call, with an account of what went in.

The parts live in `documents`, `tokens` and `packing`; batches are `batches`' part."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ot_ray.data.documents import DataConfig, read_documents
from ot_ray.data.examples import Document
from ot_ray.data.files import Files
from ot_ray.data.packing import IGNORE, PackedSequence, pack, packing
from ot_ray.data.tokens import TokenSpan, tokenize
from ot_ray.errors import ConfigError, DataError
from ot_ray.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUIET_SECONDS = 1.0
"""Reading shows its progress when it takes longer than this."""

NOTHING_SAID = "nothing to learn"
CUT_AWAY = "all that is learnt lies beyond the length"


@dataclass(frozen=True)
class Counts:
    """What became of a source."""

    documents: int
    """Documents read, those dropped included."""

    tokens: int
    """Tokens in the sequences, without padding."""

    learnable_tokens: int
    """Tokens that enter the loss."""

    cut_tokens: int
    """Tokens beyond the length, in prompts, completions and chats that were kept."""

    dropped: dict[str, int]
    """Documents dropped, by reason."""


@dataclass(frozen=True)
class PackedDataset:
    """Packed sequences and where they come from."""

    sequences: list[PackedSequence]
    counts: Counts
    digest: str
    """sha256 over the sequences: equal for equal content, tokenizer, order and length."""


def load_sequences(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, length: int, files: Files | None = None
) -> PackedDataset:
    """Read, tokenise and pack a source into sequences of `length` tokens.

    Args:
        files: opens the files of `s3://` sources.

    Raises:
        ConfigError: `length` is below 2, or more than the tokenizer's model takes; an `s3://` source
            without `files`.
        DataError: the source is missing or malformed, or leaves nothing to learn.
        MissingDependencyError: the source needs the `eval` extra.
    """
    check_length(length, tokenizer)
    intake = _Intake(tokenizer, length)
    sequences = pack(intake.spans(_shown(read_documents(config, files))), length, pad_id(tokenizer))
    if not sequences:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in intake.dropped.items())
        raise DataError(
            f"{config.name}: nothing is left of {intake.documents} documents ({reasons or 'too short'}); "
            f"raise the length ({length} tokens) or check the data"
        )
    counts = Counts(
        documents=intake.documents,
        tokens=sum(int(sequence.real.sum()) for sequence in sequences),
        learnable_tokens=sum(int((sequence.labels != IGNORE).sum()) for sequence in sequences),
        cut_tokens=intake.cut_tokens,
        dropped=intake.dropped,
    )
    return PackedDataset(sequences, counts, _digest(sequences))


def first_sequences(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, length: int, count: int, files: Files | None = None
) -> list[PackedSequence]:
    """The first `count` sequences of `load_sequences`, or all if there are fewer; the rest is not read.

    Raises:
        ConfigError, DataError, MissingDependencyError: as `load_sequences` does.
    """
    check_length(length, tokenizer)
    spans = _Intake(tokenizer, length).spans(read_documents(config, files))
    sequences = list(itertools.islice(packing(spans, length, pad_id(tokenizer)), count))
    if not sequences:
        raise DataError(f"{config.name}: there is nothing to learn in it at {length} tokens; check the data")
    return sequences


def check_length(length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError if the tokenizer's model does not take sequences of `length` tokens."""
    if length > tokenizer.model_max_length:
        raise ConfigError(
            f"length is {length}, but the tokenizer's model takes {tokenizer.model_max_length} tokens; "
            f"use 2..{tokenizer.model_max_length}"
        )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills sequences up."""
    # Padding is never learnt nor attended to by documents, so any known token serves.
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def teaches(span: TokenSpan) -> bool:
    """Whether a document has a token to learn; its first has nothing before it to be predicted from."""
    return any(span.learn[1:])


class _Intake:
    """Tokenises documents as they come and keeps count of what is lost."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self.documents, self.cut_tokens = 0, 0
        self.dropped: dict[str, int] = {}

    def spans(self, documents: Iterable[Document]) -> Iterator[TokenSpan]:
        for document in documents:
            self.documents += 1
            span = tokenize(document, self._tokenizer, self._length)
            if teaches(span):
                self.cut_tokens += span.cut
                yield span
            else:
                reason = CUT_AWAY if span.cut else NOTHING_SAID
                self.dropped[reason] = self.dropped.get(reason, 0) + 1


def _shown(documents: Iterable[Document]) -> Iterator[Document]:
    """Pass documents on, under a progress bar from the moment the wait gets noticeable."""
    start, bar = time.monotonic(), None
    with ExitStack() as stack:
        for count, document in enumerate(documents, 1):
            yield document
            if bar is not None:
                bar.advance()
            elif time.monotonic() - start > QUIET_SECONDS:
                bar = stack.enter_context(Progress("reading", None, "document"))
                bar.advance(count)


def _digest(sequences: Iterable[PackedSequence]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(str(len(sequence.input_ids)).encode())
        for tensor in (sequence.input_ids, sequence.position_ids, sequence.labels, sequence.real):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
