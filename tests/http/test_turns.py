"""Whose turn it is: every asker once before any twice, a queue with an end, and room that is kept for others."""

from __future__ import annotations

from serve.engine.turns import Turns


def taken(turns: Turns[str], count: int) -> str:
    return "".join(item or "-" for item in (turns.next(lambda _: True) for _ in range(count)))


def test_askers_take_turns_and_so_do_an_askers_requests() -> None:
    turns: Turns[str] = Turns(100)
    for asker, item in [("anna", "a"), ("anna", "b"), ("anna", "c"), ("ben", "x"), ("carl", "y")]:
        assert turns.add(asker, item)
    assert taken(turns, 9) == "axybxycxy"
    assert sorted(turns.remove(lambda item: item in "xb")) == ["b", "x"]
    assert taken(turns, 4) == "aycy"
    assert len(turns) == 3


def test_what_may_not_begin_keeps_its_place() -> None:
    turns: Turns[str] = Turns(100)
    for asker, item in [("anna", "a"), ("anna", "b"), ("ben", "x")]:
        turns.add(asker, item)
    assert turns.next(lambda item: item != "a") == "b"
    assert turns.next(lambda item: item == "-") is None
    assert turns.next(lambda _: True) == "x"
    assert turns.next(lambda _: True) == "a"


def test_one_asker_cannot_fill_the_queue_and_all_together_cannot_pass_its_end() -> None:
    turns: Turns[str] = Turns(16)
    own = 0
    while turns.add("anna", "a"):
        own += 1
    assert 8 <= own < 16
    others = 0
    while turns.add(f"other {others}", "x"):
        others += 1
    assert others >= 2
    assert len(turns) <= 16
