"""The nine tasks that ship, over data sets of their own shape on disk: each has training examples, `race` too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from ot_ray.data import DataConfig, read_documents, tokenize
from ot_ray.data.race import ORIGINAL_DATASET, by_article
from ot_ray.data.tasks import load_task, splits_of
from ot_ray.errors import DataError
from ot_ray.evaluation.harness import HarnessConfig
from tests.fixtures.local_tasks import document
from tests.fixtures.models import tiny_model

BASE = Path(__file__).parents[2] / "jobs/base"
SHIPPED = HarnessConfig().tasks
OPTIONS = ["a key", "a list", "a line", "a file"]


def write_dataset(folder: Path, config: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """A data set as a folder of the hub has it: one configuration of several splits."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split, rows in splits.items():
        name = f"{config}-{split}.jsonl"
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"split": split, "path": name})
    card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}\n---\n")


def race_rows() -> list[dict[str, Any]]:
    """Questions on two articles, those of the first not all together; the last question of an article has a blank."""
    asked = [(1, "What opens it?", "B"), (2, "What is a tuple?", "D"), (1, "It is a  _  .", "A"),
             (1, "Why does it fail?", "C"), (2, "It holds  _  .", "A")]  # fmt: skip
    return [
        {
            "example_id": f"high{article}.txt",
            "article": f"Article {article} is on files.\nIt ends.",
            "question": question,
            "answer": answer,
            "options": OPTIONS[article:] + OPTIONS[:article],
        }
        for article, question, answer in asked
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the harness finds its data sets under their names on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    test = [document(number) for number in range(3)]
    train = [document(number) for number in range(10, 14)]
    whole = {"train": train, "validation": test, "test": test}
    names = {"allenai/openbookqa": "main", "allenai/sciq": "default", "baber/piqa": "default"}
    names |= {"Rowan/hellaswag": "default", "stanfordnlp/web_questions": "default"}
    names |= {"EleutherAI/wikitext_document_level": "wikitext-2-raw-v1"}
    for name, config in names.items():
        write_dataset(tmp_path / name, config, whole)
    for config in ("ARC-Easy", "ARC-Challenge"):
        write_dataset(tmp_path / "arc" / config, config, whole)
    write_dataset(tmp_path / "EleutherAI/race", "high", {"test": test})
    write_dataset(tmp_path / ORIGINAL_DATASET, "high", {"train": race_rows(), "test": race_rows()[:1]})
    return tmp_path


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_task_can_be_trained_on(name: str, hub: Path) -> None:
    config = "ARC-Easy" if name == "arc_easy" else "ARC-Challenge"
    (hub / "allenai").mkdir(exist_ok=True)
    (hub / "arc" / config).rename(hub / "allenai/ai2_arc")
    assert "train" in splits_of(load_task(name))
    examples = list(read_documents(DataConfig(source=f"task:{name}")))
    assert len(examples) == (2 if name == "race" else 4)
    for example in examples:
        texts = [segment.text for segment in example.segments]  # type: ignore[union-attr]
        assert all(text.strip() for text in texts)


def test_race_is_trained_as_it_would_be_scored(hub: Path) -> None:
    """What it learns is the request that the harness makes of the same articles where they are the test split."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    wrapper: Any = HFLM
    harness_model = wrapper(pretrained=tiny_model("opt", depth=1), tokenizer=tokenizer, backend="causal")
    rows = race_rows()
    fields = ("question", "answer", "options")
    written = [
        {"article": own[0]["article"], "problems": str([{field: row[field] for field in fields} for row in own])}
        for own in ([rows[0], rows[2], rows[3]], [rows[1], rows[4]])
    ]
    write_dataset(hub / "EleutherAI/race", "high", {"test": written})
    examples = list(read_documents(DataConfig(source="task:race")))
    task = load_task("race")
    task.build_all_requests(rank=0, world_size=1)
    asked = {(instance.doc_id, instance.idx): instance.args for instance in task.instances}
    # The right answers of the last questions are C and A.
    for number, right in enumerate((2, 0)):
        context, continuation = harness_model._encode_pair(*asked[number, right])
        span = tokenize(examples[number], tokenizer, 10_000)
        assert span.input_ids == [*context, *continuation, tokenizer.eos_token_id]
        assert span.learn == [False] * len(context) + [True] * (len(continuation) + 1)
    # The answers of the questions before the last stand in the text.
    texts = ["".join(segment.text for segment in example.segments) for example in examples]  # type: ignore[union-attr]
    assert "Question: What opens it?\nAnswer: a line\n" in texts[0] and texts[0].endswith("Why does it fail? a file")


def test_articles_come_in_the_order_of_their_first_rows() -> None:
    found = by_article(race_rows())
    assert [one["article"][:9] for one in found] == ["Article 1", "Article 2"]
    assert "What is a tuple?" in found[1]["problems"] and "What is a tuple?" not in found[0]["problems"]


def test_where_the_original_is_not_there_it_is_named(hub: Path) -> None:
    (hub / ORIGINAL_DATASET).rename(hub / "gone")
    with pytest.raises(DataError, match=r"ehovy/race/high, which cannot be loaded: .*; load it once with a network"):
        list(read_documents(DataConfig(source="task:race")))
