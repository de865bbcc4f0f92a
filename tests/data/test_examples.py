from __future__ import annotations

from typing import Any

import pytest

from ot_ray.data.examples import Conversation, Example, Message, Segment, parse_row
from ot_ray.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def test_text_row_is_one_learnt_segment() -> None:
    assert parse_row({"text": "a b"}, "text", "f") == Example((Segment("a b", True),), "f")


def test_text_field_names_another_key() -> None:
    assert parse_row({"body": "a", "id": 3}, "body", "f") == Example((Segment("a", True),), "f")


def test_completion_is_learnt_and_keeps_its_leading_space() -> None:
    example = parse_row({"prompt": "2+2 is", "completion": " 4"}, "text", "f")
    assert example == Example((Segment("2+2 is", False), Segment(" 4", True)), "f")


def test_messages_learn_the_assistant_by_weight() -> None:
    rows = [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}, USER, ASSISTANT]
    parsed = parse_row({"messages": rows}, "text", "f")
    assert isinstance(parsed, Conversation)
    assert [message.learn for message in parsed.messages] == [False, False, False, True, False, True]
    assert parsed.messages[0] == Message("user", "hi", False)


def test_messages_win_over_other_columns() -> None:
    row = {"text": "t", "prompt": "p", "completion": "c", "messages": [USER, ASSISTANT]}
    assert isinstance(parse_row(row, "text", "f"), Conversation)


def test_nulls_that_a_table_fills_in_are_no_keys() -> None:
    row = {"messages": [USER | {"weight": None, "name": None}, ASSISTANT]}
    assert isinstance(parse_row(row, "text", "f"), Conversation)


def test_only_text_may_be_split() -> None:
    assert Example((Segment("a", True),)).splittable
    assert not Example((Segment("a", False), Segment("b", True))).splittable


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "found a list, not an object"),
        ("a", "found a string, not an object"),
        ({}, "found an object without keys"),
        ({"txt": 1, "id": 2}, r"found the keys 'id', 'txt'; write one of .*prompt.*messages.*text_field"),
        ({"text": 3}, "text is a number; write a string"),
        ({"text": None}, "text is null; write a string"),
        ({"text": "a\ud800"}, r"text holds half of a surrogate pair, '\\ud800', at character 2"),
        ({"prompt": "a", "completion": ["b"]}, "completion is a list; write a string"),
        ({"messages": "hi"}, "messages is a string; write a list of messages"),
        ({"messages": ["hi"]}, r"messages\[0\] is a string"),
        ({"messages": []}, "no assistant message among 0"),
        ({"messages": [USER]}, "no assistant message among 1"),
        (
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            r"messages\[1\].role is 'bot'; use one of sys",
        ),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role is null"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\].content is null; write a string"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, r"messages\[1\].weight is 0.5; use 0 or 1"),
        ({"messages": [USER, ASSISTANT | {"weight": True}]}, r"messages\[1\].weight is True"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": []}]}, r"messages\[1\] has the keys 'tool_calls'"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.jsonl, line 7: {message}"):
        parse_row(row, "text", "data.jsonl, line 7")
