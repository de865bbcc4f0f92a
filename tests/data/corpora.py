"""Small corpora whose every word is a token of its own, and streams over them as ranks would run them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ot_ray.data import StreamConfig, TextStream, open_stream
from ot_ray.errors import DataError

WORDS = 4000
EOS = 0
LENGTH = 16

Batch = dict[str, Tensor]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Word `w7` is token 7, whatever stands beside it."""
    words = {"</s>": EOS, "<unk>": WORDS, **{f"w{number}": number for number in range(1, WORDS)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def documents(count: int, seed: int = 0, prompts: bool = False) -> list[dict[str, str]]:
    """Rows of 1 to 60 words, no word in two of them; with `prompts`, every third is a short prompt and answer."""
    dice = random.Random(seed)
    words = (f"w{number}" for number in range(1, WORDS))
    rows = []
    for number in range(count):
        if prompts and number % 3 == 0:
            question, answer = ([next(words) for _ in range(dice.randint(1, 6))] for _ in range(2))
            rows.append({"prompt": " ".join(question), "completion": " " + " ".join(answer)})
        else:
            size = dice.choice([1, 3, 8, 20, 60])
            rows.append({"text": " ".join(next(words) for _ in range(size))})
    return rows


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_corpus(folder: Path, kind: str, rows: Sequence[Mapping[str, str]], files: int = 3) -> str:
    """The rows as several files of one kind; returns the source that names them."""
    folder.mkdir()
    for number in range(files):
        part = rows[number::files]
        if kind == "parquet":
            table = pyarrow.table({"text": [row["text"] for row in part]})
            pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=4)
        elif kind == "text":
            (folder / f"{number}.txt").write_text("\f\n".join(row["text"].replace(" w", "\nw") for row in part))
        else:
            data = jsonl(part)
            if kind == "jsonl.gz":
                data = gzip.compress(data)
            elif kind == "jsonl.zst":
                # Two frames, as concatenated archives have.
                half = len(data) // 2
                data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
            (folder / f"{number}.{'jsonl' if kind == 'hub' else kind}").write_bytes(data)
    return f"hub:{folder}" if kind == "hub" else str(folder)


class Ranks:
    """All ranks of a run, in this process."""

    def __init__(self, config: StreamConfig, world_size: int = 1, batch_size: int = 6, seed: int = 1) -> None:
        tokenizer = word_tokenizer()
        self.streams: list[TextStream] = [
            open_stream(config, tokenizer, LENGTH, batch_size, seed, rank, world_size) for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams:
            stream.close()

    def next(self) -> Batch:
        """The global batch."""
        world_size = len(self.streams)
        shares = [stream.next_batch(rank, world_size) for rank, stream in enumerate(self.streams)]
        return {name: torch.cat([share[name] for share in shares]) for name in shares[0]}

    def take(self, count: int) -> list[Batch]:
        return [self.next() for _ in range(count)]

    def rest(self) -> list[Batch]:
        """All batches until the source dries up."""
        return list(self.until_dry())

    def states(self) -> list[dict[str, Any]]:
        """What a checkpoint would hold."""
        return json.loads(json.dumps([stream.state() for stream in self.streams]))

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        for stream in self.streams:
            stream.restore(states)

    def until_dry(self) -> Iterator[Batch]:
        while True:
            try:
                yield self.next()
            except DataError as error:
                if "dries up" not in str(error):
                    raise
                return


def settings(source: object, **values: Any) -> StreamConfig:
    """A stream in this process with windows of few documents."""
    return StreamConfig(**{"source": str(source), "workers": 0, "shuffle_window": 4, **values})


def same(left: Sequence[Batch], right: Sequence[Batch]) -> bool:
    """Whether two runs gave the same batches."""
    return len(left) == len(right) and all(
        list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def tokens(batches: Sequence[Batch]) -> list[int]:
    """The real tokens, without the ends of documents."""
    return [token for batch in batches for token in batch["input_ids"][batch["real"]].tolist() if token != EOS]
