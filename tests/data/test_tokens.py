from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from ot_ray.data import Conversation, Document, Example, Message, Segment, TokenSpan, render, tokenize
from ot_ray.errors import DataError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} "
    "[/INST]{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Shows the thinking of the last turn only, as reasoning models' templates do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n\n{% endfor %}"
ALTERNATING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Start with the user') }}{% endif %}"


def text(value: str) -> Example:
    return Example((Segment(value, True),))


def completion(prompt: str, answer: str) -> Example:
    return Example((Segment(prompt, False), Segment(answer, True)))


def chat(*turns: tuple[str, str], silent: tuple[int, ...] = ()) -> Conversation:
    messages = (
        Message(role, content, role == "assistant" and index not in silent)
        for index, (role, content) in enumerate(turns)
    )
    return Conversation(tuple(messages), "chats.jsonl, line 5")


def learnt(span: TokenSpan, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The stretches of tokens that are learnt, decoded."""
    stretches: list[list[int]] = []
    for index, token in enumerate(span.input_ids):
        if span.learn[index]:
            if not index or not span.learn[index - 1]:
                stretches.append([])
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_text_is_learnt_whole_and_ends_in_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    span = tokenize(text("Return a list."), tokenizer, max_length=2)
    assert tokenizer.decode(span.input_ids) == "Return a list.</s>"
    assert all(span.learn)
    assert span.splittable
    assert span.cut == 0


def test_text_keeps_what_the_tokenizer_adds(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=True)
    span = tokenize(text("Return a list."), tokenizer, max_length=9)
    assert tokenizer.decode(span.input_ids) == "<s>Return a list.</s>"
    assert span.learn == [False] + [True] * (len(span.input_ids) - 1)


def test_eos_is_not_doubled(make_tokenizer: MakeTokenizer) -> None:
    span = tokenize(text("a</s>"), make_tokenizer(), max_length=9)
    assert span.input_ids.count(2) == 1


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("answer", [" four", "four", "  two words", "\n\tü €🙂 x", " "])
def test_exactly_the_completion_is_learnt(
    make_tokenizer: MakeTokenizer, trim_offsets: bool, bos: bool, answer: str
) -> None:
    tokenizer = make_tokenizer(bos=bos, trim_offsets=trim_offsets)
    span = tokenize(completion("Question: 2+2?", answer), tokenizer, max_length=64)
    assert learnt(span, tokenizer) == [f"{answer}</s>"]
    assert tokenizer.decode(span.input_ids) == f"{'<s>' * bos}Question: 2+2?{answer}</s>"
    assert not span.splittable


def test_prompt_and_completion_have_the_tokens_of_one_text(tokenizer: PreTrainedTokenizerFast) -> None:
    span = tokenize(completion("the ret", "urn value"), tokenizer, max_length=64)
    assert span.input_ids == [*tokenizer("the return value")["input_ids"], tokenizer.eos_token_id]
    # The token that straddles the border is learnt.
    assert learnt(span, tokenizer)[0].endswith("urn value</s>")


def test_a_long_completion_is_cut_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenize(completion("Return", " a list of values"), tokenizer, max_length=64)
    span = tokenize(completion("Return", " a list of values"), tokenizer, max_length=4)
    assert span.input_ids == whole.input_ids[:4]
    assert span.learn == whole.learn[:4]
    assert span.cut == len(whole.input_ids) - 4


def test_nothing_said_is_nothing_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    for document in (text(""), completion("Return", "")):
        assert not any(tokenize(document, tokenizer, max_length=9).learn)


def test_a_chat_learns_the_assistant_and_its_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    document = chat(
        ("system", "Be brief."),
        ("user", "Hi? assistant\nHello."),
        ("assistant", "Hello."),
        ("user", "And?"),
        ("assistant", " two\nlines "),
    )
    span = tokenize(document, tokenizer, max_length=512)
    assert learnt(span, tokenizer) == ["Hello.<|im_end|>", " two\nlines <|im_end|>"]
    assert tokenizer.decode(span.input_ids).endswith(" two\nlines <|im_end|>\n")
    assert not span.splittable


def test_a_silent_turn_is_not_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    document = chat(("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two"), silent=(1,))
    assert learnt(tokenize(document, tokenizer, 512), tokenizer) == ["two<|im_end|>"]


def test_an_assistant_may_begin(tokenizer: PreTrainedTokenizerFast) -> None:
    document = chat(("assistant", "Welcome."), ("user", "Hi."))
    assert learnt(tokenize(document, tokenizer, 512), tokenizer) == ["Welcome.<|im_end|>"]


def test_the_marker_may_stand_in_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    document = chat(("user", "[[assistant]]"), ("assistant", "[[assistant]] yes"))
    assert learnt(tokenize(document, tokenizer, 512), tokenizer) == ["[[assistant]] yes<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        # A space before the content shares its first token, which is learnt.
        (TRIMMING, "one ", [" one </s>", " two </s>"]),
        (THINKING, "<think>hm</think>one", ["one<|im_end|>", "two<|im_end|>"]),
        (BARE, "one", [" one\n\n", " two\n\n"]),
    ],
)
def test_templates_that_rewrite_turns(
    make_tokenizer: MakeTokenizer, template: str, answer: str, expected: list[str]
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    document = chat(("user", "q"), ("assistant", answer), ("user", "q"), ("assistant", "two"))
    assert learnt(tokenize(document, tokenizer, 512), tokenizer) == expected


def test_a_long_chat_is_cut_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    document: Document = chat(("user", "q"), ("assistant", "one"))
    whole = tokenize(document, tokenizer, 512)
    span = tokenize(document, tokenizer, 6)
    assert span.input_ids == whole.input_ids[:6]
    assert span.cut == len(whole.input_ids) - 6


def test_the_prompt_is_what_generation_meets(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    document = chat(("user", "q"), ("assistant", "one"))
    span = tokenize(document, tokenizer, 512)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, return_dict=False
    )
    assert span.input_ids[: span.learn.index(True)] == prompt


def test_without_a_template_turns_are_named_and_the_prompt_is_what_generation_meets(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    document = chat(
        ("system", "Be brief."), ("user", "Hi? "), ("assistant", "Hello."), ("user", "q"), ("assistant", "two")
    )
    span = tokenize(document, tokenizer, 512)
    assert tokenizer.decode(span.input_ids) == (
        "System:\nBe brief.\n\nUser:\nHi? \n\nAssistant:\nHello.</s>\n\nUser:\nq\n\nAssistant:\ntwo</s>\n\n"
    )
    assert learnt(span, tokenizer) == ["Hello.</s>", "two</s>"]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi? "}]
    prompt = tokenizer(render(asked, tokenizer, reply=True), add_special_tokens=False)["input_ids"]
    assert span.input_ids[: span.learn.index(True)] == prompt


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ALTERNATING, "the chat template refuses the conversation: Start with the user"),
        ("{{ messages[0]['role'] }}", r"does not show what .* in messages\[0\]"),
        (
            "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
            r"does not show what .* in messages\[0\]",
        ),
        ("{{ messages[0]['content'] | length }}", r"does not show what .* in messages\[0\]"),
    ],
)
def test_a_template_that_does_not_serve(make_tokenizer: MakeTokenizer, template: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^chats\.jsonl, line 5: .*{message}"):
        tokenize(chat(("assistant", "one")), make_tokenizer(chat_template=template), 512)


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DataError, match=r"no end-of-sequence token; set tokenizer\.eos_token"):
        tokenize(text("a"), make_tokenizer(eos_token=None), 9)
