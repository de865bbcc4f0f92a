"""Tokens to text: whole characters only, and not a letter of a stop string."""

from __future__ import annotations

import pytest
from tiny_service import tokens_of
from transformers import PreTrainedTokenizerFast

from serve.engine.text import Detokenizer, StopFilter


def test_characters_of_many_tokens_come_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "naïve 漢字 👩\u200d🔬 end"
    reader = Detokenizer(tokenizer, tokens_of("Prompt: "))
    pieces = [reader.push(token) for token in tokens_of(text)]
    assert "".join(pieces) + reader.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)


def test_broken_bytes_are_told_in_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = Detokenizer(tokenizer, [])
    data = b"a\xff\xfeb\xe6\xbc"
    pieces = [reader.push(token) for token in tokens_of(data)]
    assert "".join(pieces) == "a\ufffd\ufffdb"
    assert reader.flush() == data[-2:].decode(errors="replace")
    assert reader.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "passed"),
    [
        (["END"], "say it. END and more", "say it. "),
        (["END"], "the ENEND of it", "the EN"),
        (["aab"], "aaab", "a"),
        (["abc", "b"], "xxabc", "xxa"),
        (["\n\n", "Q:"], "one\ntwo\nQ: three", "one\ntwo\n"),
        (["END"], "nothing of the kind EN", "nothing of the kind EN"),
        ([], "plain", "plain"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_nothing_of_a_stop_string_passes(stops: list[str], text: str, passed: str, size: int) -> None:
    filtered, out = StopFilter(stops), ""
    for start in range(0, len(text), size):
        out += filtered.push(text[start : start + size])
        assert passed.startswith(out)
        if filtered.stopped:
            break
    assert out + filtered.flush() == passed
    assert filtered.stopped == (passed != text)


@pytest.mark.parametrize("data", [b"\x80" * 200 + b"end", b"\xe6\xbc" * 90, b"ab" + b"\xf0\x9f" * 60 + "漢".encode()])
def test_bytes_that_end_no_character_are_not_held_forever(tokenizer: PreTrainedTokenizerFast, data: bytes) -> None:
    reader = Detokenizer(tokenizer, [])
    text = ""
    for token in tokens_of(data):
        text += reader.push(token)
        assert len(reader._ids) - reader._released <= 64
    assert text + reader.flush() == tokenizer.decode(tokens_of(data)) == data.decode(errors="replace")


def test_tokens_without_text_are_not_held_forever(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = Detokenizer(tokenizer, tokens_of("x"))
    assert "".join(reader.push(token) for token in [1] * 200 + tokens_of("é") + [1] * 200) == "é"
    assert len(reader._ids) < 160
