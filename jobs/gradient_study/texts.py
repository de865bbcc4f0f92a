"""The customers' texts: found on this machine, freed of what they have in common, dealt out, packed, kept by content.

How docstrings and topics are read is the data room's."""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from transformers import PreTrainedTokenizerBase

from jobs.gradient_study.config import Customer, GradientStudyConfig
from ot_ray.data import DataConfig, PackedSequence, docstrings, language_reference, load_sequences
from ot_ray.data.cpython import PARTS, distinct_topics, split_topics
from ot_ray.data.packing import collate
from ot_ray.errors import DataError
from ot_ray.store import Store

LARGEST_SHARE = 0.1
"""Of a customer's characters that one document may be; the rest of it is left out."""

Sequences = dict[str, list[PackedSequence]]
"""By customer."""


@dataclass(frozen=True)
class CustomerTexts:
    """Packed texts of every customer; no paragraph of one part stands in another, of whichever customer."""

    train: Sequences
    validation: Sequences
    test: Sequences

    def tokens(self, customer: str) -> dict[str, int]:
        """Tokens of each part of a customer's text."""
        return {part: sum(int(own.real.sum()) for own in getattr(self, part)[customer]) for part in PARTS}


def read_customers(config: GradientStudyConfig, tokenizer: PreTrainedTokenizerBase) -> CustomerTexts:
    """Find the text of every customer and pack it.

    Raises:
        ConfigError: the tokenizer's model takes no sequences of that length.
        DataError: a package is not installed here, or a customer has too little text.
    """
    found = [
        (f"{customer.name}/{number:05}", text)
        for customer in config.customers
        for number, text in enumerate(_documents(customer, config.characters))
    ]
    distinct = distinct_topics(found)
    parts: dict[str, Sequences] = {part: {} for part in PARTS}
    for customer in config.customers:
        own = [(name, text) for name, text in distinct if name.startswith(f"{customer.name}/")]
        for part, documents in split_topics(own, seed=0).items():
            if not documents:
                raise DataError(
                    f"customer {customer.name} has {len(own)} documents, which leaves none for {part}; give it more "
                    "packages, or raise characters"
                )
            sequences = _packed([text for _, text in documents], f"{customer.name} {part}", config, tokenizer)
            parts[part][customer.name] = sequences if part == "train" else _spread(sequences, config.limit)
    return CustomerTexts(**parts)


def keep_texts(texts: CustomerTexts, store: Store) -> str:
    """Keep packed texts under a key that names their content; the key."""
    tensors = {
        f"{part}/{customer}/{field}": tensor
        for part in PARTS
        for customer, own in getattr(texts, part).items()
        for field, tensor in collate(own).items()
    }
    content = save(tensors)
    key = f"texts/{hashlib.sha256(content).hexdigest()[:20]}.safetensors"
    if not store.exists(key):
        store.write(key, content)
    return key


def kept_texts(store: Store, key: str, customers: Sequence[str]) -> CustomerTexts:
    """What `keep_texts` kept, the customers in this order."""
    tensors = load(store.read(key))
    return CustomerTexts(
        **{part: {customer: _sequences(tensors, f"{part}/{customer}") for customer in customers} for part in PARTS}
    )


def _documents(customer: Customer, characters: int) -> list[str]:
    """Whole documents in an order of chance, the longest cut, as many as `characters` hold."""
    if customer.packages:
        documents = [text for package in customer.packages for text in docstrings(_folder(customer, package))]
    else:
        documents = [text for _, text in language_reference()]
    random.Random(0).shuffle(documents)
    chosen: list[str] = []
    left = characters
    for text in documents:
        cut = text[: int(characters * LARGEST_SHARE)]
        # What is cut ends with a paragraph, if it has several.
        whole = cut if cut == text else cut.rpartition("\n\n")[0] or cut
        if len(whole) <= left:
            chosen.append(whole)
            left -= len(whole)
    return chosen


def _folder(customer: Customer, package: str) -> Path:
    paths = sysconfig.get_paths()
    for place in ("purelib", "platlib", "stdlib"):
        folder = Path(paths[place], *package.split("."))
        if folder.is_dir():
            return folder
    raise DataError(
        f"customer {customer.name} wants package {package!r}, which is not installed here; install it, or name another"
    )


def _packed(
    documents: Sequence[str], name: str, config: GradientStudyConfig, tokenizer: PreTrainedTokenizerBase
) -> list[PackedSequence]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, f"{name}.jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        return list(load_sequences(DataConfig(source=str(path)), tokenizer, config.sequence_length).sequences)


def _spread(sequences: list[PackedSequence], limit: int) -> list[PackedSequence]:
    """At most `limit` of them at even distances."""
    count = min(limit, len(sequences))
    return [sequences[place * len(sequences) // count] for place in range(count)]


def _sequences(tensors: Mapping[str, torch.Tensor], prefix: str) -> list[PackedSequence]:
    fields = [tensors[f"{prefix}/{field}"].unbind() for field in ("input_ids", "position_ids", "labels", "real")]
    return [PackedSequence(*row) for row in zip(*fields, strict=True)]
