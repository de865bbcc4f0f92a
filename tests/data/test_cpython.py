from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from ot_ray.data import docstrings, language_reference, write_quickstart_data
from ot_ray.data.cpython import LONGEST_ECHO, PARTS, SHORTEST_DOCUMENT, distinct_topics, split_topics
from ot_ray.errors import DataError

RUN = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture
def small_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the standard library's, to keep the test small."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    write_quickstart_data(folder, seed=0)
    return folder


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def runs(documents: list[str]) -> set[tuple[str, ...]]:
    words = [document.split() for document in documents]
    return {tuple(w[i : i + LONGEST_ECHO]) for w in words for i in range(len(w) - LONGEST_ECHO + 1)}


def test_docstrings_come_in_source_order_and_cleaned(small_stdlib: Path) -> None:
    source = f'''"""Module. {"x" * 80}"""
def late():
    """Function.

        Indented.
    Not.
    """
    def inner():
        "Inner."
class Thing:
    """Class."""
    async def method(self): "Method."
'''
    (small_stdlib / "b.py").write_text(source)
    (small_stdlib / "a.py").write_text(f'"""First. {"y" * 80}"""')
    expected = f"Module. {'x' * 80}\n\nFunction.\n\n    Indented.\nNot.\n\nInner.\n\nClass.\n\nMethod."
    assert list(docstrings()) == [f"First. {'y' * 80}", expected]


def test_what_is_short_broken_or_a_test_is_left_out(small_stdlib: Path) -> None:
    long = f'"""{"word" * 30}"""'
    (small_stdlib / "short.py").write_text('"""Too short."""')
    (small_stdlib / "broken.py").write_text(f"{long}\nprint 'two'")
    (small_stdlib / "zero.py").write_bytes(long.encode() + b"\n\0")
    (small_stdlib / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n" + long.encode() + b"\n# \xe4")
    for folder in ("test", "idlelib", "site-packages", "unittest/test", "json/tests"):
        (small_stdlib / folder).mkdir(parents=True)
        (small_stdlib / folder / "module.py").write_text(long)
    assert list(docstrings()) == ["word" * 30]


def test_the_running_python_documents_itself() -> None:
    names = dict(language_reference())
    assert list(names) == sorted(names)
    assert names["while"].startswith('The "while" statement')


def test_distinct_topics_keep_shared_paragraphs_in_the_shortest() -> None:
    own, other = "Own words. " * 9, "Other words here. " * 9
    topics = [("all", f"{RUN} and more.\n\n{own}\n\nSee:"), ("part", f"Intro, {RUN}.\n\n{other}\n\nSee:")]
    topics[0] = ("all", topics[0][1] + "\n\n" + "Longer. " * 30)
    # The runs differ at their ends only ("twelve." and "twelve and"), so eleven words are no echo.
    assert dict(distinct_topics(topics))["all"].startswith(RUN)
    topics[1] = ("part", topics[1][1].replace("twelve.", "twelve and"))
    distinct = dict(distinct_topics(topics))
    assert distinct["part"].startswith(f"Intro, {RUN}")
    assert distinct["all"].startswith("Own words.")
    assert "See:" not in distinct["all"]


def test_distinct_topics_leave_out_what_stands_elsewhere_and_what_gets_short() -> None:
    kept = "Nothing of this is known to anyone. " * 3
    topics = [("a", f"{RUN} again\n\n{kept}"), ("b", f"{RUN} tail " * 8), ("c", kept)]
    assert distinct_topics(topics, elsewhere=[f"Before {RUN} after"]) == [("c", kept)]


@pytest.mark.parametrize("seed", range(5))
def test_topics_are_dealt_by_characters(seed: int) -> None:
    topics = distinct_topics(language_reference())
    parts = split_topics(topics, seed)
    assert sorted(topic for part in parts.values() for topic in part) == topics
    total = sum(len(text) for _, text in topics)
    for name, share in PARTS.items():
        assert sum(len(text) for _, text in parts[name]) / total == pytest.approx(share, abs=0.08)


def test_seeds_deal_differently_and_repeatably() -> None:
    topics = [(f"t{n}", "x" * (100 + n)) for n in range(30)]
    assert split_topics(topics, 1) == split_topics(reversed(topics), 1)
    assert split_topics(topics, 1) != split_topics(topics, 2)


@pytest.mark.slow
def test_no_part_of_the_quickstart_data_repeats_another(quickstart: Path) -> None:
    files = ["public/train.jsonl", *(f"customer/{part}.jsonl" for part in PARTS)]
    assert sorted(str(path.relative_to(quickstart)) for path in quickstart.rglob("*.*")) == sorted(files)
    public, train, validation, test = (runs(texts(quickstart / name)) for name in files)
    assert min(len(public), len(train), len(validation), len(test)) > 1000
    for unseen in (validation, test):
        assert not unseen & train
        assert not unseen & public
    assert not validation & test
    assert all(len(text) >= SHORTEST_DOCUMENT for name in files for text in texts(quickstart / name))


def test_a_python_without_sources_is_refused(small_stdlib: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no standard-library sources"):
        write_quickstart_data(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_python_without_topics_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="no documentation topics; install the full standard library"):
        language_reference()
