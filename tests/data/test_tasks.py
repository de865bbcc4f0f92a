"""Training examples of tasks: token for token what the lm-evaluation-harness scores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from ot_ray.data import DataConfig, load_sequences, read_documents, source_digest, tokenize
from ot_ray.data.documents import Source
from ot_ray.data.tasks import load_task
from ot_ray.errors import ConfigError, DataError, MissingDependencyError
from tests.fixtures.local_tasks import document, write_split, write_tasks
from tests.fixtures.models import tiny_model

BASE = Path(__file__).parents[2] / "jobs/base"
# Which answer is right, of each task that asks a question and has a training split.
RIGHT: dict[str, Callable[[dict[str, Any]], int]] = {
    **dict.fromkeys(("local_openbookqa", "local_arc", "local_race"), lambda one: "ABCD".index(one["answerKey"])),
    **dict.fromkeys(
        ("small_openbookqa", "small_arc_easy", "small_arc_challenge"), lambda one: "ABCD".index(one["answerKey"])
    ),
    **dict.fromkeys(("small_piqa", "small_hellaswag"), lambda one: one["label"]),
    # Its right answer comes last.
    "small_sciq": lambda one: 3,
    # All of its answers are right.
    **dict.fromkeys(("local_webqs", "small_webqs"), lambda one: 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks whose documents are the same for training and testing."""
    place = tmp_path_factory.mktemp("tasks")
    folder = write_tasks(place)
    # One with spaces where the question ends, which the harness scores with the answer.
    documents = [document(number) for number in range(8)]
    documents[3]["question_stem"] += "  "
    for split in ("train", "test"):
        write_split(place, split, documents)
    return folder


@pytest.fixture(scope="module", params=["plain", "with a first token"])
def harness_model(request: pytest.FixtureRequest) -> Any:
    """The harness's wrapper, with a tokenizer of byte pairs; where asked for, one that begins each text."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if request.param != "plain":
        first = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = first
        assert tokenizer.encode("a")[0] == tokenizer.eos_token_id
    return HFLM(pretrained=tiny_model("opt", depth=1), tokenizer=tokenizer, backend="causal")


def requests(name: str, folder: Path) -> dict[tuple[int, int], tuple[str, ...]]:
    """What the harness asks, by document and choice."""
    task = load_task(name, folder)
    task.build_all_requests(rank=0, world_size=1)
    return {(instance.doc_id, instance.idx): instance.args for instance in task.instances}


def config(name: str, folder: Path | None, **changes: Any) -> DataConfig:
    return DataConfig(source=f"task:{name}", tasks_folder=str(folder) if folder else None, **changes)


@pytest.mark.parametrize("name", RIGHT)
def test_a_choice_is_trained_as_it_is_scored(name: str, folder: Path, harness_model: Any) -> None:
    asked = requests(name, folder)
    found = list(read_documents(config(name, folder)))
    assert len(found) == 8
    for number, example in enumerate(found):
        context, continuation = harness_model._encode_pair(*asked[number, RIGHT[name](document(number))])
        span = tokenize(example, harness_model.tokenizer, 10_000)
        # One token more says where the answer ends.
        assert span.input_ids == [*context, *continuation, harness_model.tokenizer.eos_token_id]
        assert span.learn == [False] * len(context) + [True] * (len(continuation) + 1)


def test_the_space_before_an_answer_is_learnt(folder: Path, harness_model: Any) -> None:
    for name in ("small_openbookqa", "small_hellaswag", "local_arc"):
        for example in read_documents(config(name, folder)):
            prompt, completion = (segment.text for segment in example.segments)  # type: ignore[union-attr]
            assert not prompt.endswith(" ") and completion.startswith(" ")
            span = tokenize(example, harness_model.tokenizer, 10_000)
            learnt = [token for token, learn in zip(span.input_ids, span.learn, strict=True) if learn]
            assert harness_model.tokenizer.decode(learnt[:-1]) == completion


@pytest.mark.parametrize("name", ["local_wikitext", "small_wikitext"])
def test_a_whole_text_is_trained_as_it_is_scored(name: str, folder: Path, harness_model: Any) -> None:
    asked = requests(name, folder)
    for number, example in enumerate(read_documents(config(name, folder))):
        span = tokenize(example, harness_model.tokenizer, 10_000)
        assert span.input_ids[:-1] == harness_model.tok_encode(*asked[number, 0])
        # Whatever begins a text is never predicted.
        assert all(span.learn[1:])


def test_a_question_that_is_answered_freely_has_its_answer(folder: Path, tmp_path: Path) -> None:
    own = write_tasks(tmp_path)
    head = (own / "local_arc.yaml").read_text().partition("output_type")[0].replace("local_arc", "local_free")
    (own / "local_free.yaml").write_text(
        head
        + 'output_type: generate_until\ndoc_to_text: "Q: {{question_stem}}\\nA:"\ndoc_to_target: "{{answers[0]}}"\n'
        "generation_kwargs: {until: ['.']}\nmetric_list:\n"
        "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    (example,) = read_documents(config("local_free", own, limit=1))
    first = document(100)
    texts = [segment.text for segment in example.segments]  # type: ignore[union-attr]
    assert texts == [f"Q: {first['question_stem']}\nA:", f" {first['answers'][0]}"]


def test_it_is_packed_like_any_other_source(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = load_sequences(config("local_arc", folder, limit=5), tokenizer, 128)
    assert data.counts.documents == 5 and not data.counts.dropped
    source = Source(config("local_arc", folder))
    assert source.count == 1
    records = list(source.records(0))
    # A stream that goes on in the middle.
    assert list(source.records(0, records[5].place)) == records[5:]


def test_the_digest_is_that_of_the_examples(folder: Path, tmp_path: Path) -> None:
    same = write_tasks(tmp_path / "same")
    other = write_tasks(tmp_path / "other", train=11)
    digests = [source_digest(config("local_arc", place)) for place in (same, other)]
    assert source_digest(config("local_arc", write_tasks(tmp_path / "again"))) == digests[0]
    digests += [source_digest(config(name, same)) for name in ("local_openbookqa", "local_wikitext")]
    digests += [source_digest(config("local_arc", same, split="test"))]
    assert len(set(digests)) == len(digests)


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'validation'; use train or test"):
        list(read_documents(config("local_arc", folder, split="validation")))
    with pytest.raises(DataError, match=r"no split 'train'; name another source of text"):
        list(read_documents(config("small_race", folder)))
    with pytest.raises(ConfigError, match="did you mean openbookqa"):
        list(read_documents(config("openbookqs", None)))
    with pytest.raises(ConfigError, match=r"tasks_folder is .*nowhere"):
        list(read_documents(config("local_arc", tmp_path / "nowhere")))
    own = write_tasks(tmp_path)
    (own / "unsafe.yaml").write_text((own / "local_arc.yaml").read_text() + "unsafe_code: true\n")
    (own / "unsafe.yaml").write_text((own / "unsafe.yaml").read_text().replace("local_arc", "local_unsafe"))
    with pytest.raises(ConfigError, match="runs code that a model writes"):
        list(read_documents(config("local_unsafe", own)))
    write_split(tmp_path, "train", [{**document(1), "answerKey": "E"}])
    with pytest.raises(DataError, match="task:local_openbookqa, split train, row 1"):
        list(read_documents(config("local_openbookqa", own)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "task:"}, "write task:name"),
        ({"source": "task:piqa", "format": "jsonl"}, "leave format out"),
        ({"source": "some.jsonl", "tasks_folder": "tasks"}, "the source is no task"),
        ({"source": "task:piqa", "revision": "main"}, "no dataset on the hub"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig(**settings)  # type: ignore[arg-type]


def test_without_the_harness_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Python itself takes for a package that is not there.
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ot_ray\[lm-eval\]'"):
        list(read_documents(config("local_arc", folder)))
