"""The engine: requests against the model, text, stops, log-probabilities, seeds and cancellation."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import torch
from by_hand import by_hand, hand_in, passes, wait_until
from pydantic import ValidationError
from tiny_service import CONTEXT, END, PLAIN_TEXT, PLAN, Shelf, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.model import plug_in
from serve.config import ServeConfig
from serve.engine.admission import BatchLimits, most_cells
from serve.engine.generation import GenerationEngine
from serve.engine.job import Ticket
from serve.engine.residency import PlugInCache
from serve.engine.sampling import Sampler
from serve.failures import ApiError
from serve.wire.completions import Choice, CompletionRequest, Logprobs, Usage


def ask(engine: GenerationEngine, **fields: Any) -> tuple[list[Choice], Usage]:
    """The whole choices of a request, put together from their stretches."""
    choices: dict[int, Choice] = {}
    usage = None
    for chunk in engine.complete(CompletionRequest.model_validate({"model": "tiny", "prompt": "Hello", **fields})):
        piece = chunk.choice
        choice = choices.setdefault(piece.index, Choice(index=piece.index, logprobs=Logprobs()))
        assert choice.finish_reason is None
        choice.text += piece.text
        choice.finish_reason = piece.finish_reason
        if piece.logprobs:
            assert choice.logprobs is not None
            choice.logprobs.extend(piece.logprobs)
        assert usage is None
        usage = chunk.usage
    assert usage is not None
    return [choices[index] for index in sorted(choices)], usage


def text_of(engine: GenerationEngine, **fields: Any) -> str:
    return ask(engine, **{"logit_bias": PLAIN_TEXT, **fields})[0][0].text


def refused(engine: GenerationEngine, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(engine, **fields)
    return caught.value


def test_greedy_text_is_what_generate_makes(
    engine: GenerationEngine, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf
) -> None:
    models = {"tiny": base, **{key: plug_in(base, PLAN, state) for key, state in shelf.states.items()}}
    prompt = torch.tensor([tokens_of("Hello")])
    texts = set()
    for name, model in models.items():
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, eos_token_id=END
        )
        expected = tokenizer.decode(made[0, 5:], skip_special_tokens=True)
        [choice], _ = ask(engine, model=name, max_tokens=24, temperature=0)
        assert choice.text == expected
        texts.add(expected)
    assert len(texts) == 3


def test_usage_and_finish_reasons(engine: GenerationEngine) -> None:
    [choice], usage = ask(engine, max_tokens=7, logit_bias=PLAIN_TEXT)
    assert choice.finish_reason == "length"
    assert len(choice.text) == 7
    assert usage == Usage(prompt_tokens=5, completion_tokens=7, total_tokens=12)
    [choice], usage = ask(engine, max_tokens=7, logit_bias={str(END): 100})
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert usage.completion_tokens == 1
    [choice], usage = ask(engine, max_tokens=0)
    assert (choice.text, choice.finish_reason, usage.completion_tokens) == ("", "length", 0)


def test_stop_strings_over_token_borders(engine: GenerationEngine) -> None:
    whole = text_of(engine, max_tokens=40, seed=3)
    stop = whole[17:21]
    expected = whole[: whole.find(stop)]
    [choice], usage = ask(engine, max_tokens=40, seed=3, logit_bias=PLAIN_TEXT, stop=["@@", stop], logprobs=0)
    assert (choice.text, choice.finish_reason) == (expected, "stop")
    assert usage.completion_tokens == len(expected) + 4
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens) == expected
    # A stop string that was begun and never ended belongs to the text.
    assert text_of(engine, max_tokens=20, seed=3, stop=whole[18:20] + "@") == whole[:20]


def test_many_byte_characters_stream_whole(
    engine: GenerationEngine, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Only the three bytes of one character may be chosen, so whole characters and broken ones come.
    bias = {str(token): 100.0 for token in tokens_of("漢")}
    fields = {"model": "tiny", "prompt": "x", "max_tokens": 60, "logit_bias": bias, "seed": 5, "stream": True}
    request = CompletionRequest.model_validate({**fields, "logprobs": 0})
    sampler = Sampler(engine.prepare(request).sampling, seed=5)
    ids = tokens_of("x")
    with torch.inference_mode():
        for _ in range(60):
            ids.append(sampler.pick(base(input_ids=torch.tensor([ids])).logits[0, -1]))
    expected = tokenizer.decode(ids[1:])
    pieces = [chunk.choice.text for chunk in engine.complete(request)]
    assert "".join(pieces) == expected
    assert {letter for piece in pieces[:-1] for letter in piece if piece.endswith(letter)} == set(expected) - {"\ufffd"}


def test_seed_reproduces_beside_other_requests(engine: GenerationEngine) -> None:
    alone = text_of(engine, max_tokens=30, seed=11)
    with ThreadPoolExecutor(4) as threads:
        beside = list(threads.map(lambda seed: text_of(engine, max_tokens=30, seed=seed), [11, 12, 11, 13]))
    assert beside[0] == beside[2] == alone
    assert len({*beside}) == 3
    assert text_of(engine, max_tokens=30) != text_of(engine, max_tokens=30)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e-5])
def test_a_temperature_near_0_takes_the_likeliest(engine: GenerationEngine, temperature: float) -> None:
    coldest = text_of(engine, max_tokens=20, temperature=0)
    assert text_of(engine, max_tokens=20, temperature=temperature, seed=1) == coldest


def test_many_prompts_and_choices(engine: GenerationEngine) -> None:
    choices, usage = ask(engine, prompt=["one", "three"], n=2, max_tokens=6, seed=1, logit_bias=PLAIN_TEXT)
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in choices}) == 4
    assert usage == Usage(prompt_tokens=8, completion_tokens=24, total_tokens=32)
    as_ids, _ = ask(
        engine, prompt=[tokens_of("one"), tokens_of("three")], n=2, max_tokens=6, seed=1, logit_bias=PLAIN_TEXT
    )
    assert as_ids == choices
    assert "9 choices" in str(refused(engine, prompt=["a", "b", "c"], n=3))


def test_echo_with_logprobs_scores_the_prompt(engine: GenerationEngine, base: PreTrainedModel) -> None:
    [choice], usage = ask(engine, prompt="héllo", echo=True, max_tokens=0, logprobs=1)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert (choice.text, usage.completion_tokens) == ("héllo", 0)
    ids = torch.tensor([tokens_of("héllo")])
    with torch.inference_mode():
        expected = torch.log_softmax(base(input_ids=ids).logits[0], -1)
    assert logprobs.token_logprobs[0] is None
    got = [value for value in logprobs.token_logprobs[1:] if value is not None]
    assert got == pytest.approx([expected[i, ids[0, i + 1]].item() for i in range(5)], abs=1e-5)
    assert logprobs.text_offset == [0, 1, 1, 2, 3, 4]

    [choice], _ = ask(engine, echo=True, max_tokens=4, logprobs=2, temperature=0, logit_bias=PLAIN_TEXT)
    assert choice.text.startswith("Hello")
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(9))
    for value, top in zip(choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], strict=True):
        assert value is not None
        assert top is not None
        assert 2 <= len(top) <= 3
        assert math.exp(value) <= 1


def test_closing_ends_the_work_within_one_token(engine: GenerationEngine) -> None:
    model, permits = engine._cache.many.model, threading.Semaphore(0)

    def wait(*_: object) -> None:
        permits.acquire(timeout=60)

    hook = model.register_forward_pre_hook(wait)
    try:
        request = CompletionRequest.model_validate(
            {"model": "tiny", "prompt": "x", "max_tokens": 100, "stream": True, "logit_bias": PLAIN_TEXT}
        )
        permits.release(3)
        with closing(engine.complete(request)) as chunks:
            for _ in range(3):
                next(chunks)
        # The fourth pass may have begun when the client left; it is the last.
        permits.release(100)
        wait_until(lambda: engine.stats().rows == 0)
        assert engine.stats().tokens <= 4
    finally:
        permits.release(100)
        hook.remove()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "x" * 120, "max_tokens": 9}, None, f"maximum context length is {CONTEXT} tokens"),
        ({"prompt": [5, 999]}, "prompt", "999"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "999"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "set it to n"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"model": "ft:tiny:nobody"}, None, "`ft:tiny:nobody` does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(
    engine: GenerationEngine, fields: dict[str, Any], param: str | None, words: str
) -> None:
    error = refused(engine, **fields)
    assert words in error.message
    assert error.param == param
    assert error.status == (404 if "model" in fields else 400)


def test_whole_context_may_be_used(engine: GenerationEngine) -> None:
    _, usage = ask(engine, prompt="x" * 120, max_tokens=8, logit_bias=PLAIN_TEXT)
    assert usage.total_tokens == CONTEXT


def test_withdrawn_between_check_and_load_is_not_found(engine: GenerationEngine, shelf: Shelf) -> None:
    job = engine.prepare(CompletionRequest(model="ft:tiny:anna", prompt=["x"]))
    del shelf.states["ft:tiny:anna"]
    with pytest.raises(ApiError) as caught:
        next(engine.generate(job))
    assert caught.value.code == "model_not_found"


def test_empty_prompt_begins_a_document(engine: GenerationEngine) -> None:
    assert ask(engine, prompt="", temperature=0) == ask(engine, prompt=None, temperature=0)
    assert ask(engine, prompt="")[1].prompt_tokens == 1


def test_one_that_does_not_fit_and_lacks_room_for_its_adapter_freezes_nobody(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.admission._PATIENCE_S", 0.0)
    cache = PlugInCache("tiny", base, shelf, max_plug_ins=1)
    engine = GenerationEngine(tokenizer, cache, limits=BatchLimits(rows=8, tokens=125))
    batcher, heard = by_hand(engine), []
    hand_in(engine, "owner", heard, max_tokens=30)
    batcher._pass()
    hand_in(engine, "anna", heard, model="ft:tiny:anna", max_tokens=5)
    # Does not fit beside the others, and anna's adapter has the only place.
    hand_in(engine, "ben", heard, model="ft:tiny:ben", max_tokens=115)
    hand_in(engine, "owner", heard, max_tokens=3)
    passes(batcher, lambda: len(heard) == 4)
    assert all(isinstance(told, tuple) for told in heard)


def test_a_cancel_in_the_midst_of_a_sweep_takes_rows_and_adapter_together(engine: GenerationEngine) -> None:
    batcher, heard = by_hand(engine), []
    anna = hand_in(engine, "anna", heard, model="ft:tiny:anna", max_tokens=50)
    passes(batcher, lambda: len(engine._batch) == 1)
    turns = batcher._admission._turns
    remove = turns.remove

    def cancelled_meanwhile(wanted: Callable[[Ticket], bool]) -> list[Ticket]:
        anna.over = True
        return remove(wanted)

    turns.remove = cancelled_meanwhile  # type: ignore[method-assign]
    stopped = hand_in(engine, "owner", heard, max_tokens=50)
    stopped.cancel()
    batcher._sweep()
    assert anna.over
    assert (anna in batcher._admission._held) == (anna in [row.ticket for row in engine._batch.rows])
    batcher._sweep()
    assert not batcher._admission._held
    assert not len(engine._batch)


@pytest.mark.parametrize("fails", ["echo", "prompt"])
def test_a_request_that_cannot_be_read_fails_alone(engine: GenerationEngine, fails: str) -> None:
    batcher, heard = by_hand(engine), {"running": [], "bad": [], "beside": []}
    hand_in(engine, "a", heard["running"], max_tokens=8)
    batcher._pass()

    def full(_: object, args: object, inputs: dict[str, Any]) -> None:
        if (inputs["input_ids"] == tokens_of("~")[0]).any():
            raise MemoryError

    engine._batch._many.model.register_forward_pre_hook(full, with_kwargs=True)
    hand_in(engine, "b", heard["bad"], prompt="~~~", echo=fails == "echo", logprobs=1, max_tokens=4)
    hand_in(engine, "c", heard["beside"], prompt="Hi", max_tokens=4)
    passes(batcher, lambda: all(heard.values()))
    assert all(isinstance(heard[name][0], tuple) for name in ("running", "beside"))
    assert isinstance(heard["bad"][0], ApiError)
    assert heard["bad"][0].status == 500


def test_a_failed_step_is_told_to_each_by_an_error_of_its_own(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise MemoryError

    monkeypatch.setattr(engine._batch, "step", broken)
    first, second = [], []
    hand_in(engine, "a", first, max_tokens=9)
    hand_in(engine, "b", second, max_tokens=9)
    wait_until(lambda: bool(first and second))
    assert isinstance(first[0], ApiError)
    assert isinstance(second[0], ApiError)
    assert first[0] is not second[0]


def test_long_prompts_are_echoed_in_stretches_and_once(
    engine: GenerationEngine, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.scoring._ROWS", 16)
    read: list[tuple[int, bool]] = []

    def note(_: object, args: object, inputs: dict[str, Any]) -> None:
        read.append((inputs["input_ids"].shape[1], "logits_to_keep" in inputs))

    engine._batch._many.model.register_forward_pre_hook(note, with_kwargs=True)
    prompt = [2 + place % 200 for place in range(50)]
    choices, _ = ask(engine, prompt=prompt, echo=True, max_tokens=1, logprobs=0, n=3)
    assert [width for width, one in read if not one] == [16, 16, 16, 1]
    with torch.inference_mode():
        expected = torch.log_softmax(base(input_ids=torch.tensor([prompt])).logits[0], -1)
    for choice in choices:
        assert choice.logprobs is not None
        got = [value for value in choice.logprobs.token_logprobs[1:50] if value is not None]
        assert got == pytest.approx([expected[i, prompt[i + 1]].item() for i in range(49)], abs=1e-4)


def test_a_probe_that_nobody_waits_for_any_more_ends_nothing(engine: GenerationEngine) -> None:
    batcher, heard = by_hand(engine), []
    hand_in(engine, "a", heard, max_tokens=3)
    batcher._pass()
    assert engine.probe().cancel()
    last = engine.probe()
    passes(batcher, lambda: bool(heard))
    assert isinstance(heard[0], tuple)
    assert last.result(60) is None


@pytest.mark.parametrize(
    ("needs", "most"),
    [([(5, 3)], 8), ([(5, 3), (5, 3)], 16), ([(10, 1000), (10, 5), (10, 5)], 1010), ([(100, 1), (1, 60)], 202)],
)
def test_rows_are_counted_while_they_are_there(needs: list[tuple[int, int]], most: int) -> None:
    assert most_cells(needs) == most


def test_an_engine_accepts_all_that_may_wait_in_it() -> None:
    model = {"name": "tiny", "source": "."}
    config = ServeConfig.model_validate({"model": model})
    assert config.max_ongoing_requests >= config.max_concurrent + config.max_waiting + 32
    with pytest.raises(ValidationError, match="max_ongoing_requests is 64"):
        ServeConfig.model_validate({"model": model, "max_ongoing_requests": 64})
