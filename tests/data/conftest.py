"""A small real tokenizer, and writers of small data files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ot_ray.data import docstrings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def trained() -> str:
    """A byte-level BPE of 600 tokens, trained on the first docstrings, as tokenizer.json text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(docstrings(), 20), trainer)
    return tokenizer.to_str()


@pytest.fixture
def make_tokenizer(trained: str) -> Callable[..., PreTrainedTokenizerFast]:
    def make(
        bos: bool = False, trim_offsets: bool = False, chat_template: str | None = CHATML, **options: Any
    ) -> PreTrainedTokenizerFast:
        inner = Tokenizer.from_str(trained)
        steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
        if bos:
            template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            steps.append(template)
        inner.post_processor = processors.Sequence(steps)
        tokens = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", **options}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
