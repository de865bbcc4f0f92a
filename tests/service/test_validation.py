"""Training data before a job is queued: the counts of training's own reading, and an answer to anything hostile."""

from __future__ import annotations

import io
import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ot_ray.data import DataConfig, load_sequences
from ot_ray.errors import ConfigError
from serve.controller.training_rows import MOST_LEVELS
from serve.controller.validation import ValidationRules, validate
from serve.controller.validation_report import ValidationReport
from tests.http.tiny_service import byte_tokenizer

LENGTH = 64
RULES = ValidationRules(length=LENGTH)
GOOD = '{"prompt": "2 + 2 =", "completion": " 4"}'


def check(content: bytes | str, tokenizer: PreTrainedTokenizerFast, rules: ValidationRules = RULES) -> ValidationReport:
    return validate(io.BytesIO(content.encode() if isinstance(content, str) else content), tokenizer, rules)


def with_good(*lines: str | bytes) -> bytes:
    """The lines after twelve good ones, so that the first of them is line 13."""
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    return b"\n".join([*_twelve(), *encoded]) + b"\n"


def _twelve() -> list[bytes]:
    return [json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}).encode() for n in range(12)]


def chat(*turns: tuple[str, str], **more: Any) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more})


CHAT = chat(("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"))
WEIGHTED = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "weight": 1},
        ]
    }
)
TEXTS = {
    "prompts": [json.dumps({"prompt": f"{n} squared is", "completion": f" {n * n}."}) for n in range(30)],
    "chats": [chat(("user", f"What is {n} + {n}?"), ("assistant", f"It is {n + n}.")) for n in range(20)],
    "weights": [CHAT, WEIGHTED] * 8,
    "texts": [json.dumps({"text": f"The number {n} comes after {n - 1}. " * (n % 9)}) for n in range(1, 27) if n % 9],
    "mixed": [GOOD, CHAT, '{"text": "plain"}'] * 6,
    "too long": [*[GOOD] * 5, *[json.dumps({"prompt": "x" * (10 * n), "completion": "y" * 20}) for n in range(12)]],
    "blank lines, BOM, CRLF": ["\ufeff" + GOOD, "", "   ", *[GOOD + "\r"] * 12, ""],
    "letters of several bytes": [json.dumps({"prompt": "Größe?", "completion": " 🦊 №1"}, ensure_ascii=False)] * 11,
    "escapes": [r'{"prompt": "\u00e9\u0000\ud83e\udd8a", "completion": "\n\t\"\\"}'] * 11,
    "keys that are not read": ['{"id": 7, "prompt": "a", "completion": "b", "note": [null, {"x": 1.5}]}'] * 11,
}


@pytest.mark.parametrize("name", TEXTS)
def test_counts_are_those_of_trainings_own_reading(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(TEXTS[name]) + "\n", newline="")
    report = validate(path, tokenizer, RULES)
    assert report.ok, report.error
    read = load_sequences(DataConfig(source=str(path)), tokenizer, LENGTH)
    assert report.examples + report.dropped == read.counts.documents
    assert report.dropped == sum(read.counts.dropped.values())
    assert report.tokens == read.counts.tokens
    assert report.learnable_tokens == read.counts.learnable_tokens
    assert report.cut_tokens == read.counts.cut_tokens
    assert report.sequences == len(read.sequences)
    assert 0 < report.learnable_tokens <= report.tokens


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
)


def test_a_models_own_template_counts_and_its_refusals_are_told(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(TEXTS["chats"]))
    report = validate(path, tokenizer, RULES)
    read = load_sequences(DataConfig(source=str(path)), tokenizer, LENGTH)
    assert report.ok and (report.tokens, report.learnable_tokens) == (read.counts.tokens, read.counts.learnable_tokens)
    # "<user>What is 3 + 3?<end><assistant>It is 6.<end>": the answer and its end are learnt.
    one = check(TEXTS["chats"][3], tokenizer, ValidationRules(length=LENGTH, min_examples=1))
    assert (one.tokens, one.learnable_tokens) == (6 + 14 + 1 + 11 + 8 + 1, 9)
    refused = check(with_good(CHAT), tokenizer)
    assert refused.errors[0].message == "Line 13: the chat template refuses the conversation: no system messages here"


def test_figures_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    """One token a byte and an end: "ab" + "c" is 4 tokens, two of which are learnt."""
    lines = [json.dumps({"prompt": letter * 2, "completion": "c"}) for letter in "abcdefghijk"]
    lines += [
        json.dumps({"prompt": "p" * 60, "completion": "q" * 10}),
        json.dumps({"prompt": "p" * 70, "completion": "q"}),
    ]
    report = check("\n".join([*lines, lines[0]]), tokenizer)
    assert report.ok
    assert (report.examples, report.dropped, report.duplicates) == (13, 1, 1)
    assert (report.truncated, report.cut_tokens, report.longest) == (1, 71 - 64, 71)
    assert report.tokens == 12 * 4 + 64
    assert report.learnable_tokens == 12 * 2 + 4
    texts = [text for _, text in report.lines]
    assert (
        report.lines[0][0] == "info" and "13 examples with 112 tokens" in texts[0] and "28 of them learnt" in texts[0]
    )
    assert any("1 examples are longer than 64 tokens; the 7 tokens" in text for text in texts)
    assert any("1 examples are left out" in text for text in texts)
    assert any("more than once" in text for text in texts)
    assert json.loads(json.dumps(report.data))["tokens"] == 112


BAD = {
    "no JSON": ("prompt: a", "not valid JSON at column 1"),
    "cut off": ('{"prompt": "a", "completion"', "not valid JSON at column 29"),
    "two values": (GOOD + GOOD, "not valid JSON"),
    "a list": ("[1, 2]", "not an object"),
    "null": ("null", "not an object"),
    "a string": ('"text"', "not an object"),
    "no keys": ("{}", "found no keys"),
    "other keys": ('{"question": "a", "answer": "b"}', "found 'answer', 'question'; write one of"),
    "prompt alone": ('{"prompt": "a"}', "found 'prompt'"),
    "a number for a text": ('{"prompt": 1, "completion": "b"}', "prompt is a number; write a string"),
    "null for a text": ('{"text": null}', "text is null"),
    "messages is text": ('{"messages": "hello"}', "messages is a string; write a list"),
    "no messages": ('{"messages": []}', "no assistant message"),
    "a message is text": ('{"messages": ["hi"]}', "messages[0] is a string"),
    "no role": ('{"messages": [{"content": "a"}]}', "messages[0].role is null"),
    "no content": ('{"messages": [{"role": "assistant"}]}', "messages[0].content is null"),
    "content in parts": (
        '{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}',
        "messages[0].content is a list",
    ),
    "unknown role": (chat(("robot", "a"), ("assistant", "b")), "messages[0].role is 'robot'"),
    "the tool's role": (chat(("tool", "a"), ("assistant", "b")), "messages[0].role is 'tool'"),
    "no assistant": (chat(("user", "a")), "no assistant message"),
    "the user speaks last": (chat(("assistant", "a"), ("user", "b")), "end with the assistant's"),
    "weight 2": ('{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "weight is 2; use 0 or 1"),
    "weight true": ('{"messages": [{"role": "assistant", "content": "a", "weight": true}]}', "weight is True"),
    "weight 0 alone": ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "nothing to learn"),
    "a name": ('{"messages": [{"role": "assistant", "content": "a", "name": "x"}]}', "'name', which training does not"),
    "tools": (chat(("user", "a"), ("assistant", "b"), tools=[]), "tools are not tuned"),
    "an empty completion": ('{"prompt": "a", "completion": ""}', "nothing to learn"),
    "an empty text": ('{"text": ""}', "nothing to learn"),
    "a key twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' stands twice"),
    "a role twice": ('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "'role' stands twice"),
    "NaN": ('{"text": "a", "x": NaN}', "NaN is no JSON number"),
    "Infinity": ('{"text": "a", "x": -Infinity}', "-Infinity is no JSON number"),
    "1e999": ('{"text": "a", "x": 1e999}', "1e999 is too large"),
    "a number of 5,000 digits": ('{"text": "a", "x": ' + "9" * 5000 + "}", "too many digits"),
    "10,000 lists": ('{"text": ' + "[" * 10_000 + "]" * 10_000 + "}", f"more than {MOST_LEVELS} levels"),
    "10,000 lists, open": ("[" * 10_000, f"more than {MOST_LEVELS} levels"),
    "10,000 objects": ('{"a":' * 10_000 + "1" + "}" * 10_000, f"more than {MOST_LEVELS} levels"),
    "half a surrogate pair": (r'{"text": "\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": (r'{"text": "a", "\udfff": 1, "\udfff": 2}', "stands twice"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8 at byte 11"),
    "UTF-16": (GOOD.encode("utf-16"), "not UTF-8"),
    "overlong UTF-8": (b'{"text": "\xc0\xaf"}', "not UTF-8"),
    "NUL bytes": (b'{"text": "a\x00b"}', "not valid JSON"),
    "only NULs": (b"\x00" * 100, "not valid JSON"),
    "a byte order mark": ("\ufeff" + GOOD, "not valid JSON"),
    "a control character": ('{"text": "a\x1b[31mb"}', "not valid JSON"),
    "single quotes": ("{'text': 'a'}", "not valid JSON"),
    "a comment": (GOOD + " // four", "not valid JSON"),
    "a comma too many": ('{"text": "a",}', "not valid JSON"),
    "a line too long": ('{"text": "' + "a" * 2**20 + '"}', "longer than 1048576 bytes"),
    "too many messages": (chat(*[("user", "a")] * 1000, ("assistant", "b")), "has 1001 messages; use at most 1000"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_with_its_line(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    line, reason = BAD[name]
    report = check(with_good(line), tokenizer)
    assert not report.ok
    [found] = report.errors
    assert found.line == 13 and found.message.startswith("Line 13: ")
    assert reason in found.message, found.message
    assert found.message.isprintable() and len(found.message) < 400
    assert report.error == {
        "code": "invalid_training_file",
        "param": "training_file",
        "message": f"The training file is invalid. {found.message}",
    }
    assert report.data["errors"] == [{"line": 13, "message": found.message}]


def test_brackets_in_text_are_no_nesting(tokenizer: PreTrainedTokenizerFast) -> None:
    line = json.dumps({"prompt": "[{" * 500 + '\\"', "completion": '"[[[['})
    assert check(with_good(line), tokenizer).ok


@pytest.mark.parametrize(
    ("head", "kind"), [(b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd")]
)
def test_a_packed_file_is_told_so(head: bytes, kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    report = check(head + b"\x00\xff" * 100, tokenizer)
    assert f"compressed ({kind})" in report.errors[0].message


def test_errors_stop_at_fifty_and_ten_are_told(tokenizer: PreTrainedTokenizerFast) -> None:
    report = check("\n".join(["{"] * 200), tokenizer)
    assert [error.line for error in report.errors] == list(range(1, 51)) and report.stopped
    assert report.error is not None
    told = report.error["message"].split("\n")
    assert len(told) == 11 and told[-1] == "and 40 more, where reading stopped"
    fifty = check("\n".join(["{"] * 50), tokenizer)
    assert len(fifty.errors) == 50 and not fifty.stopped


def test_at_least_ten_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    for content, count in ((b"", 0), (b"\n\n", 0), (f"{GOOD}\n" * 4, 4), (f"{GOOD}\n" * 9, 9)):
        assert check(content, tokenizer).error == {
            "code": "invalid_n_examples",
            "param": "training_file",
            "message": f"Training file has {count} example(s), but must have at least 10 examples",
        }
    assert check(f"{GOOD}\n" * 10, tokenizer).ok
    assert check(GOOD, tokenizer, ValidationRules(length=LENGTH, file="validation_file", min_examples=1)).ok
    empty = check("", tokenizer, ValidationRules(length=LENGTH, file="validation_file", min_examples=1))
    assert empty.error is not None and empty.error["param"] == "validation_file"
    assert "Validation file has 0 example(s)" in empty.error["message"]
    # An example of which nothing is left does not count.
    long = json.dumps({"prompt": "p" * 100, "completion": "q"})
    report = check(f"{GOOD}\n" * 9 + long, tokenizer)
    assert report.error is not None and "has 9 example(s) (and 1 of which nothing is left" in report.error["message"]


def test_one_line_of_100_mb_is_never_held(tokenizer: PreTrainedTokenizerFast) -> None:
    class Endless(io.RawIOBase):
        left = 100 * 2**20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            count = min(len(buffer), self.left)
            buffer[:count] = b"a" * count
            self.left -= count
            return count

    tracemalloc.start()
    try:
        report = validate(io.BufferedReader(Endless()), tokenizer, RULES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.errors[0].message == "Line 1: longer than 1048576 bytes; write each example on a line of its own"
    assert peak < 16 * 2**20


def test_many_lines_are_not_held_either(tokenizer: PreTrainedTokenizerFast) -> None:
    lines = [json.dumps({"prompt": f"{n:09d}", "completion": "y"}).encode() + b"\n" for n in range(2000)]
    once = io.BytesIO(b"".join(lines))
    check(b"".join(lines[:50]), tokenizer)
    tracemalloc.start()
    try:
        report = validate(once, tokenizer, RULES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.examples == 2000
    assert peak < 2 * 2**20


def test_reading_tells_how_far_it_is_and_ends_in_time(tokenizer: PreTrainedTokenizerFast) -> None:
    content = f"{GOOD}\n" * 20
    read: list[int] = []
    validate(io.BytesIO(content.encode()), tokenizer, RULES, read.append)
    assert sum(read) == len(content)
    slow = ValidationRules(length=LENGTH, max_seconds=1e-9)
    report = validate(io.BytesIO(content.encode()), tokenizer, slow, lambda _: time.sleep(0.001))
    assert report.stopped and "took longer than" in report.errors[-1].message


def test_a_length_that_the_model_does_not_take_is_the_operators_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="model takes"):
        validate(io.BytesIO(b""), tokenizer, ValidationRules(length=int(tokenizer.model_max_length) + 1))


def test_noise_is_told_or_read_as_training_reads_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """What is accepted is what training reads, whatever the file; 500 files that were broken by chance."""
    rng, path, accepted = random.Random(5), tmp_path / "noise.jsonl", 0
    lines = [GOOD.encode(), CHAT.encode(), WEIGHTED.encode(), rb'{"text": "plain \u00e9\ud83e\udd8a"}']
    noise = [
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b",",
        b"\n",
        b"\r",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"null",
        b"NaN",
        b"1e999",
    ]
    noise += [b"\\ud800", b"\x0c", b"\x1f\x8b", b"weight", b"0", b"system", "é".encode()]
    rules = ValidationRules(length=LENGTH, min_examples=1)
    for _ in range(500):
        content = bytearray(b"\n".join(rng.choice(lines) for _ in range(rng.randint(1, 4))))
        for _ in range(rng.randint(0, 3)):
            place = rng.randrange(len(content) + 1)
            if rng.random() < 0.6:
                content[place:place] = rng.choice(noise)
            else:
                del content[place : place + rng.randint(1, 4)]
        report = check(bytes(content), tokenizer, rules)
        if report.ok:
            path.write_bytes(content)
            read = load_sequences(DataConfig(source=str(path)), tokenizer, LENGTH)
            assert report.tokens == read.counts.tokens and report.sequences == len(read.sequences)
            assert report.learnable_tokens == read.counts.learnable_tokens
            accepted += 1
        else:
            assert report.error is not None and report.error["code"] in ("invalid_training_file", "invalid_n_examples")
    assert 50 < accepted < 450


def test_a_conversation_full_of_markers_ends_soon(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "[" * 3000 + "[[assistant]]" + "]" * 3000
    report = check(with_good(chat(("user", text), ("assistant", "ok"))), tokenizer, ValidationRules(length=8192))
    assert report.ok
