from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ot_ray.data import DataConfig, first_sequences, load_sequences
from ot_ray.errors import ConfigError, DataError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
WriteJsonl = Callable[..., Path]

CHAT = {"messages": [{"role": "user", "content": "q " * 40}, {"role": "assistant", "content": "a"}]}


def test_every_document_is_accounted_for(tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(
        {"text": "Return a list of names."},
        {"text": ""},
        {"prompt": "Return", "completion": ""},
        {"prompt": "Return", "completion": " the value " * 20},
        CHAT,
    )
    dataset = load_sequences(DataConfig(source=str(path)), tokenizer, length=32)
    text = len(tokenizer("Return a list of names.")["input_ids"]) + 1
    prompt = len(tokenizer("Return")["input_ids"])
    completion = len(tokenizer("Return" + " the value " * 20)["input_ids"]) + 1
    counts = dataset.counts
    assert counts.documents == 5
    assert counts.dropped == {"nothing to learn": 2, "all that is learnt lies beyond the length": 1}
    assert counts.cut_tokens == completion - 32
    assert counts.tokens == text + 32
    assert counts.learnable_tokens == text - 1 + 32 - prompt
    decoded = [tokenizer.decode(sequence.input_ids[sequence.real]) for sequence in dataset.sequences]
    assert "Return a list of names.</s>" in decoded


def test_the_digest_names_content_and_packing(tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl) -> None:
    rows = [{"text": f"Return item {n} of the list."} for n in range(20)]
    config = DataConfig(source=str(write_jsonl(*rows)))
    first = load_sequences(config, tokenizer, 32)
    assert re.fullmatch("[0-9a-f]{64}", first.digest)
    assert load_sequences(config, tokenizer, 32).digest == first.digest
    reordered = DataConfig(source=str(write_jsonl(*reversed(rows), name="other.jsonl")))
    limited = DataConfig(source=config.source, limit=19)
    others = [load_sequences(reordered, tokenizer, 32), load_sequences(limited, tokenizer, 32)]
    others.append(load_sequences(config, tokenizer, 16))
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_nothing_left_says_why(tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl({"text": ""}, {"text": ""}, CHAT)
    with pytest.raises(DataError, match=r"nothing is left of 3 documents \(nothing to learn: 2, all that .*: 1\)"):
        load_sequences(DataConfig(source=str(path)), tokenizer, length=16)


def test_a_length_beyond_the_model_is_refused(make_tokenizer: MakeTokenizer, write_jsonl: WriteJsonl) -> None:
    config = DataConfig(source=str(write_jsonl({"text": "Return a list."})))
    bounded = make_tokenizer(model_max_length=64)
    with pytest.raises(ConfigError, match=r"length is 65, but the tokenizer's model takes 64 tokens"):
        load_sequences(config, bounded, 65)
    assert load_sequences(config, bounded, 64).sequences
    # Tokenizers that know no bound say so with a huge number.
    assert load_sequences(config, make_tokenizer(), 4096).sequences
    with pytest.raises(ConfigError, match="length is 1"):
        load_sequences(config, bounded, 1)


def test_a_tokenizer_without_padding_serves(make_tokenizer: MakeTokenizer, write_jsonl: WriteJsonl) -> None:
    config = DataConfig(source=str(write_jsonl({"text": "Return a list."})))
    (sequence,) = load_sequences(config, make_tokenizer(pad_token=None), 32).sequences
    assert sequence.input_ids[-1] == 2
    assert not sequence.real[-1]


def test_progress_is_shown_only_when_reading_takes_long(
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: WriteJsonl,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DataConfig(source=str(write_jsonl(*[{"text": "Return a list."}] * 5)))
    load_sequences(config, tokenizer, 16)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("ot_ray.data.load.QUIET_SECONDS", -1.0)
    load_sequences(config, tokenizer, 16)
    assert "5document" in capsys.readouterr().err.replace(" ", "")


def test_the_first_sequences_are_those_of_the_whole_and_the_rest_is_not_read(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl
) -> None:
    rows = [{"text": f"Return a list of {number} names. " * 3} for number in range(20)]
    path = write_jsonl(*rows)
    config = DataConfig(source=str(path))
    every = load_sequences(config, tokenizer, length=16).sequences
    for count in (1, 5, len(every) + 3):
        first = first_sequences(config, tokenizer, 16, count)
        assert len(first) == min(count, len(every))
        for ours, whole in zip(first, every, strict=False):
            assert ours.input_ids.equal(whole.input_ids) and ours.labels.equal(whole.labels)
    path.write_text(path.read_text() + "no JSON\n")
    assert len(first_sequences(config, tokenizer, 16, 5)) == 5
    with pytest.raises(DataError, match="21"):
        first_sequences(config, tokenizer, 16, len(every) + 3)


def test_first_sequences_of_nothing_are_refused(tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        first_sequences(DataConfig(source=str(write_jsonl({"text": ""}))), tokenizer, 16, 4)
