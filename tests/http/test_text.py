"""Tokens to text: whole characters only, and not a letter of a stop string."""

from __future__ import annotations

import random
from typing import Any

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


def first_stop(stops: list[str], text: str) -> str:
    """By definition: the text before the stop string that is whole first, the longest of those that are."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_that_repeat_themselves_and_overlap(seed: int) -> None:
    chance = random.Random(seed)
    stops = ["".join(chance.choices("ab", k=chance.randint(1, 7))) for _ in range(chance.randint(1, 4))]
    text = "".join(chance.choices("ab", weights=(3, 1), k=60))
    filtered, out, rest = StopFilter(stops), "", text
    while rest and not filtered.stopped:
        size = chance.randint(1, 9)
        out, rest = out + filtered.push(rest[:size]), rest[size:]
    assert out + filtered.flush() == first_stop(stops, text)


class Counted(str):
    """A stop string that counts how often one of its letters is looked at."""

    looked = 0

    def __getitem__(self, place: Any) -> str:
        self.looked += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("stop", ["a" * 400 + "b", "ab" * 200 + "c", "a" * 100_000])
def test_a_stop_string_costs_a_bounded_number_of_looks_a_letter(stop: str) -> None:
    counted, text = Counted(stop), ("ab" * 199 + "aa" * 199) * 4
    filtered, out = StopFilter([counted]), ""
    for letter in text:
        out += filtered.push(letter)
    assert out + filtered.flush() == text
    assert counted.looked <= 8 * len(text)


def test_tokens_are_decoded_a_bounded_number_of_times(tokenizer: PreTrainedTokenizerFast) -> None:
    reader, text, decoded = Detokenizer(tokenizer, tokens_of("Prompt: ")), "naïve 漢字 👩\u200d🔬 " * 40, []
    decode = reader._decode

    def counted(ids: list[int]) -> str:
        decoded.append(len(ids))
        return decode(ids)

    reader._decode = counted  # type: ignore[method-assign]
    assert "".join(map(reader.push, tokens_of(text))) + reader.flush() == text
    count = len(tokens_of(text))
    assert len(decoded) <= 1.2 * count
    assert sum(decoded) <= 24 * count
