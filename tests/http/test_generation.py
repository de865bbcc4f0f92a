"""The engine: requests against the model, text, stops, log-probabilities, seeds and cancellation."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_service import CONTEXT, END, PLAIN_TEXT, PLAN, Shelf, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.model import plug_in
from serve.engine.decoding import decode
from serve.engine.generation import GenerationEngine
from serve.engine.sampling import Sampler, Sampling
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
        usage = chunk.usage
    assert usage is not None
    return list(choices.values()), usage


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
    bias = dict.fromkeys(tokens_of("漢"), 100.0)
    steps = decode(base, tokens_of("x"), Sampler(Sampling(logit_bias=bias), seed=5))
    expected = tokenizer.decode([token for token, _ in islice(steps, 60)])
    fields = {"model": "tiny", "prompt": "x", "max_tokens": 60, "logit_bias": {str(k): v for k, v in bias.items()}}
    request = CompletionRequest.model_validate({**fields, "seed": 5})
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


def test_closing_ends_the_work_within_one_token(engine: GenerationEngine, base: PreTrainedModel) -> None:
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    hook = base.register_forward_hook(count)
    try:
        request = CompletionRequest.model_validate(
            {"model": "tiny", "prompt": "x", "max_tokens": 100, "logit_bias": PLAIN_TEXT}
        )
        with closing(engine.complete(request)) as chunks:
            for _ in range(3):
                next(chunks)
    finally:
        hook.remove()
    assert forwards == 3


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
