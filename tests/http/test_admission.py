"""Who is in the batch: rows that outgrow it come back and end as they would alone, and no memory for one harms one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from by_hand import by_hand, hand_in, passes, wait_until
from tiny_service import BASE, CONTEXT, PLAIN_TEXT, Shelf
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from serve.engine import kv_rows
from serve.engine.admission import Admission, BatchLimits
from serve.engine.generation import GenerationEngine
from serve.engine.job import BEGUN, Row
from serve.engine.residency import PlugInCache
from serve.failures import ApiError
from serve.wire.chat import ChatRequest

EngineOf = Callable[[BatchLimits], GenerationEngine]


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is passed by others depends on no time, so that the same rows are together in every run."""
    monkeypatch.setattr("serve.engine.admission._PATIENCE_S", -1.0)


@pytest.fixture
def engine_of(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf) -> EngineOf:
    return lambda limits: GenerationEngine(tokenizer, PlugInCache(BASE, base, shelf), 8, limits)


class Watched:
    """Notes which rows are put off, and holds that to its rules."""

    def __init__(self, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gone: list[Row] = []
        self.most = 0
        put_off = Admission.put_off

        def noted(admission: Admission, running: Sequence[Row]) -> list[Row]:
            gone = put_off(admission, running)
            staying = [row for row in running if row not in gone]
            assert len(staying) == 1 or len(staying) * max(row.length for row in staying) <= tokens
            assert min(running, key=lambda row: row.number) in staying
            self.gone += gone
            self.most = max(self.most, len(staying))
            return gone

        monkeypatch.setattr(Admission, "put_off", noted)


def assert_same(heard: list[Any], other: list[Any]) -> None:
    """Two requests were answered to their end with the same text, tokens and usage, and with like log-probabilities."""
    texts, scores = [], []
    for all_told in (heard, other):
        assert all(isinstance(told, tuple) for told in all_told), all_told
        assert [told[1] is not None for told in all_told] == [False] * (len(all_told) - 1) + [True]
        texts.append(("".join(told[0].text for told in all_told), all_told[-1][1]))
        scores.append([item for told in all_told for item, _ in told[0].scores])
    assert texts[0] == texts[1]
    assert [item.token for item in scores[0]] == [item.token for item in scores[1]]
    expected = [item.logprob or 0.0 for item in scores[1]]
    assert [item.logprob or 0.0 for item in scores[0]] == pytest.approx(expected, abs=1e-4)


ASKED: list[dict[str, Any]] = [
    {"max_tokens": 60},
    {"max_tokens": 70, "prompt": "A longer prompt than others", "temperature": 1, "seed": 3, "logprobs": 2},
    {"max_tokens": 50, "temperature": 0.8, "top_p": 0.7, "seed": 4, "presence_penalty": 1, "frequency_penalty": 0.5},
    {"max_tokens": 64, "model": "ft:tiny:anna", "stream": True},
    {"max_tokens": 40, "model": "ft:tiny:ben", "temperature": 1, "seed": 5, "echo": True, "logprobs": 0},
    {"max_tokens": 30, "n": 2, "temperature": 1, "seed": 6},
]


def test_rows_that_outgrow_the_batch_come_back_and_answer_as_alone(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [answered_alone(engine_of, **fields) for fields in ASKED]
    monkeypatch.setattr("serve.engine.admission._AHEAD", 4)
    engine = engine_of(BatchLimits(rows=8, tokens=160))
    watched, batcher = Watched(160, monkeypatch), by_hand(engine)
    loaded: list[Any] = []
    for name in ("anna", "ben"):
        hand_in(engine, name, loaded, model=f"ft:tiny:{name}", max_tokens=1)
    passes(batcher, lambda: len(loaded) == 2)
    beside: list[list[Any]] = [[] for _ in ASKED]
    tickets = [hand_in(engine, str(i), beside[i], **fields) for i, fields in enumerate(ASKED)]
    passes(batcher, lambda: all(ticket.over for ticket in tickets))
    assert len(watched.gone) > 4
    assert len({id(row) for row in watched.gone}) < len(watched.gone), "none was put off twice"
    assert watched.most > 2
    for fields, one, other in zip(ASKED, alone, beside, strict=True):
        if fields.get("n"):
            one, other = ([sorted(part[0].text for part in heard)] for heard in (one, other))
            assert one == other
        else:
            assert_same(other, one)
    assert engine.stats().waiting == 0
    assert not batcher._admission._held


def test_chats_without_a_limit_run_beside_each_other(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.admission._AHEAD", 8)

    def chat(engine: GenerationEngine, heard: list[Any], number: int) -> None:
        said = [{"role": "user", "content": f"Say {number}."}]
        fields = {"model": BASE, "messages": said, "seed": number, "logit_bias": PLAIN_TEXT}
        job = engine.prepare_chat(ChatRequest.model_validate(fields))
        engine.submit(job, lambda told: None if told is BEGUN else heard.append(told), str(number))

    alone, beside = [], []
    for number in range(4):
        engine = engine_of(BatchLimits())
        chat(engine, heard := [], number)
        wait_until(lambda heard=heard: bool(heard))
        alone.append(heard)
    engine = engine_of(BatchLimits(tokens=2 * CONTEXT))
    batcher = by_hand(engine)
    for number in range(4):
        beside.append([])
        chat(engine, beside[-1], number)
    batcher._pass()
    assert len(engine._batch) == 4
    passes(batcher, lambda: all(beside))
    for heard, expected in zip(beside, alone, strict=True):
        assert_same(heard, expected)


def test_one_that_leaves_while_it_is_put_off_is_forgotten(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.admission._AHEAD", 1)
    engine = engine_of(BatchLimits(tokens=40))
    batcher, first, second = by_hand(engine), [], []
    hand_in(engine, "a", first, max_tokens=60)
    ticket = hand_in(engine, "b", second, model="ft:tiny:anna", max_tokens=60)
    passes(batcher, lambda: batcher._admission.has_put_off)
    assert engine.stats().waiting == 1
    ticket.cancel()
    batcher._pass()
    assert not batcher._admission.has_put_off
    assert not batcher._admission._held
    passes(batcher, lambda: bool(first))
    assert not second or not any(told[1] for told in second)


def test_one_that_leaves_from_among_others_harms_none_of_them(engine_of: EngineOf) -> None:
    engine, kept = engine_of(BatchLimits()), [{"seed": seed, "max_tokens": 20, "temperature": 1} for seed in range(3)]
    batcher, heard = by_hand(engine), [[] for _ in kept]
    hand_in(engine, "a", heard[0], **kept[0])
    ticket = hand_in(engine, "b", gone := [], max_tokens=60, prompt="A longer prompt")
    hand_in(engine, "c", heard[1], **kept[1])
    batcher._pass()
    batcher._pass()
    ticket.cancel()
    hand_in(engine, "d", heard[2], **kept[2])
    passes(batcher, lambda: all(heard))
    assert not gone
    for told, fields in zip(heard, kept, strict=True):
        assert_same(told, answered_alone(engine_of, **fields))


def test_those_that_wait_get_their_turn_after_a_step_that_failed(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(BatchLimits(rows=1))
    step, failed = engine._batch.step, []

    def broken_once() -> None:
        if failed:
            return step()
        wait_until(lambda: bool(second_is_in))
        failed.append(True)
        raise MemoryError

    monkeypatch.setattr(engine._batch, "step", broken_once)
    first, second, second_is_in = [], [], []
    hand_in(engine, "a", first, max_tokens=9)
    second_is_in.append(hand_in(engine, "b", second, max_tokens=9))
    wait_until(lambda: bool(first and second))
    assert isinstance(first[0], ApiError)
    assert isinstance(second[0], tuple)


def answered_alone(engine_of: EngineOf, **fields: Any) -> list[Any]:
    engine, heard = engine_of(BatchLimits()), []
    batcher = by_hand(engine)
    ticket = hand_in(engine, "a", heard, **fields)
    passes(batcher, lambda: ticket.over)
    return heard


RUNNING = {"max_tokens": 30, "temperature": 1, "seed": 1}
BESIDE = {"max_tokens": 12, "prompt": "Beside", "temperature": 1, "seed": 2}


@pytest.mark.parametrize("prompt", ["x", "much longer than those that run by then"])
@pytest.mark.parametrize("lacking", [0, 5, 11])
def test_no_memory_for_a_row_that_joins_harms_that_row_alone(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, prompt: str, lacking: int
) -> None:
    """`lacking`: the tensor, of two for each of six layers, for which there is no memory."""
    engine, allocated, joined = engine_of(BatchLimits()), [], kv_rows._joined
    batcher, heard = by_hand(engine), {"running": [], "bad": [], "beside": []}

    def lacks(old: Any, used: int, shift: int, new: torch.Tensor) -> torch.Tensor:
        # Of the bad prompt alone, or of both: whatever holds it is too much.
        if new.shape[0] == 2 or new.shape[2] == len(prompt):
            allocated.append(new.shape)
            if len(allocated) % 12 == lacking or new.shape[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return joined(old, used, shift, new)

    hand_in(engine, "a", heard["running"], **RUNNING)
    for _ in range(4):
        batcher._pass()
    monkeypatch.setattr(kv_rows, "_joined", lacks)
    hand_in(engine, "b", heard["bad"], prompt=prompt, max_tokens=4)
    hand_in(engine, "c", heard["beside"], **BESIDE)
    passes(batcher, lambda: all(heard.values()))
    assert [error.status for error in heard["bad"]] == [500]
    assert allocated
    assert_same(heard["running"], answered_alone(engine_of, **RUNNING))
    assert_same(heard["beside"], answered_alone(engine_of, **BESIDE))


def test_no_memory_for_the_first_token_of_a_row_harms_that_row_alone(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(BatchLimits())
    batcher, heard = by_hand(engine), {"running": [], "bad": [], "beside": []}

    def lacks(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hand_in(engine, "a", heard["running"], **RUNNING)
    batcher._pass()
    monkeypatch.setattr("serve.engine.batch.scores_of", lacks)
    hand_in(engine, "c", heard["beside"], **BESIDE)
    hand_in(engine, "b", heard["bad"], max_tokens=4, logprobs=1)
    passes(batcher, lambda: all(heard.values()))
    assert [error.status for error in heard["bad"]] == [500]
    # The one that joined with it drew no number twice.
    assert_same(heard["beside"], answered_alone(engine_of, **BESIDE))
    assert_same(heard["running"], answered_alone(engine_of, **RUNNING))


def test_a_token_that_cannot_be_told_ends_its_own_request(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(BatchLimits())
    batcher, good, bad = by_hand(engine), [], []
    hand_in(engine, "a", good, **RUNNING)
    ticket = hand_in(engine, "b", bad, max_tokens=9)
    batcher._pass()
    [row] = [row for row in engine._batch.rows if row.ticket is ticket]

    def broken(*_: object) -> None:
        raise OverflowError

    monkeypatch.setattr(row.growing, "push", broken)
    passes(batcher, lambda: bool(good and bad))
    assert [error.status for error in bad] == [500]
    assert_same(good, answered_alone(engine_of, **RUNNING))
