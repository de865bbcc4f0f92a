from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ot_ray.config import parse
from ot_ray.data import Conversation, DataConfig, Example, read_documents
from ot_ray.data.readers import LONGEST_TEXT, _cut, _parts
from ot_ray.errors import ConfigError, DataError, MissingDependencyError


def read(source: object, **settings: Any) -> list[str]:
    """The learnt text of every document of a source."""
    documents = list(read_documents(DataConfig(source=str(source), **settings)))
    return ["".join(s.text for s in d.segments if s.learn) for d in documents if isinstance(d, Example)]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffÄ one\r\n\r\ntwo\n".encode())
    assert read(path) == ["Ä one\n\ntwo\n"]


def test_a_separator_divides_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ftwo\f\f three")
    assert read(path, document_separator="\f") == ["one", "two", " three"]


def test_a_separator_on_a_block_border_still_divides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ot_ray.data.readers._BLOCK", 4)
    path = tmp_path / "a.txt"
    path.write_text("one<cut>twö<cut>three")
    assert read(path, document_separator="<cut>") == ["one", "twö", "three"]


@pytest.mark.parametrize("block", range(1, 9))
def test_a_separator_divides_where_a_long_document_is_cut(block: int) -> None:
    texts = ["a" * length for length in range(6, 20)] + ["b" * 20 + "<cu"]
    whole = "<cut>\n".join(texts)
    blocks = [whole[start : start + block] for start in range(0, len(whole), block)]
    pieces = list(_parts([*blocks, ""], "<cut>\n", 7))
    assert "".join(pieces) == "".join(texts)
    assert all(len(piece) <= 7 for piece in pieces)
    # Where a block ends changes nothing.
    assert pieces == [piece for text in texts for piece in _cut(text, 7)]


def test_a_huge_text_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(f"line {number}\n" for number in range(LONGEST_TEXT // 5))
    path.write_text(text)
    parts = read(path)
    assert len(parts) > 1
    assert "".join(parts) == text
    assert all(part.endswith("\n") and len(part) <= LONGEST_TEXT for part in parts)


def test_jsonl_is_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text": "two"}\n{"text": broken}\n')
    assert read(path, limit=2) == ["one", "two"]


def test_all_jsonl_shapes_in_one_file(write_jsonl: Callable[..., Path]) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_jsonl({"text": "t"}, {"prompt": "p", "completion": " c"}, chat)
    text, completion, conversation = read_documents(DataConfig(source=str(path)))
    assert isinstance(text, Example)
    assert isinstance(completion, Example)
    assert [segment.learn for segment in completion.segments] == [False, True]
    assert isinstance(conversation, Conversation)
    assert conversation.where == f"{path}, line 3"


def test_parquet_of_every_shape(tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    tables = {
        "text": {"text": ["one", "two"], "id": [1, 2]},
        "prompts": {"prompt": ["p"], "completion": [" c"]},
        "chats": {"messages": chat},
    }
    for name, columns in tables.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    assert read(tmp_path / "text.parquet") == ["one", "two"]
    assert read(tmp_path / "prompts.parquet") == [" c"]
    (conversation,) = read_documents(DataConfig(source=str(tmp_path / "chats.parquet")))
    assert isinstance(conversation, Conversation)
    assert [message.learn for message in conversation.messages] == [False, True]


def test_a_folder_and_a_glob_are_read_in_path_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "c.md").write_text("c")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("h")
    assert read(tmp_path) == ["a", "b", "c"]
    assert read(tmp_path, format="jsonl") == ["b"]
    assert read(tmp_path / "*.txt", limit=1) == ["a"]
    assert read(tmp_path / "**" / "*.md") == ["c"]


def test_a_format_overrules_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"data\.json: cannot tell the format.*set data\.format"):
        read(path)
    assert read(path, format="jsonl") == ["a"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_local_folder_serves_as_a_hub_dataset(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    if suffix == "jsonl":
        (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        (folder / "test.jsonl").write_text('{"text": "three"}\n')
    else:
        for split, texts in {"train": ["one", "two"], "test": ["three"]}.items():
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{split}.parquet")
    assert read(f"hub:{folder}") == ["one", "two"]
    assert read(f"hub:{folder}", split="test") == ["three"]
    assert read(folder, format="hub", limit=1) == ["one"]
    with pytest.raises(DataError, match=r"hub:.*, split dev: cannot be loaded: .*dev"):
        read(f"hub:{folder}", split="dev")


def test_a_dataset_on_the_hub_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        return iter([{"text": f"{path} {config} {options['split']} {options['revision']}"}])

    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    assert read(f"hub:{tmp_path}", revision="v1") == ["one"], "a folder has no revisions"
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read("hub:owner/name/part", revision="v1") == ["owner/name part train v1"]
    assert read("hub:owner/name") == ["owner/name None train None"]


def test_hub_rows_are_checked_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(DataError, match=r"split train, row 1: found the keys 'body'"):
        read(f"hub:{tmp_path}")


def test_a_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot be loaded: .*/no/such/folder"):
        read("hub:/no/such/folder")
    with pytest.raises(DataError, match=r"hub:nobody/nothing/part, split train: cannot be loaded"):
        read("hub:nobody/nothing/part")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"line 2: not valid JSON at column \d+"),
        (b'{"text": "a"}\n[1]\n', "line 2: found a list"),
        (b"[" * 100_000 + b"\n", "line 1: not usable JSON"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', "line 3: not UTF-8 at byte 25"),
        (b'{"text": 1' + b"0" * 5000 + b"}\n", "line 1: not usable JSON|line 1: text is a number"),
        (b"", "holds no documents"),
        (b"\n \n", "holds no documents"),
    ],
)
def test_a_broken_jsonl_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
def test_text_that_is_not_utf8_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("ot_ray.data.readers._BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes("äö\nü".encode() + b"x\n\xe4rger")
    with pytest.raises(DataError, match=r"a\.txt, line 3: not UTF-8 at byte 9"):
        read(path)


def test_text_that_ends_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\n\xe2\x82")
    with pytest.raises(DataError, match="line 2: not UTF-8 at byte 3"):
        read(path)


def test_an_empty_text_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a\.txt: the file holds no documents"):
        read(tmp_path)


def test_broken_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: the columns are 'body', 'id'; rows must be .*prompt"):
        read(path)
    assert read(path, text_field="body") == ["a"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: text is null"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match=r"a\.parquet: the file holds no documents"):
        read(path)


def test_a_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl\?"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read(tmp_path / "nowhere" / "a.txt")
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder holds no \.txt"):
        read(tmp_path / "empty")


@pytest.mark.parametrize(("package", "source"), [("pyarrow.parquet", "a.parquet"), ("datasets", "hub:owner/name")])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ot_ray\[eval\]'"):
        read(source)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": ""}, "source"),
        ({"source": "a", "format": "csv"}, "format"),
        ({"source": "a", "limit": 0}, "limit"),
        ({"source": "hub:a/b", "format": "text"}, "format is 'text'; use 'hub'"),
        ({"source": "hub:", "format": "hub"}, "names no dataset"),
        ({"source": "a", "document_separator": ""}, "document_separator"),
        ({"source": "a", "revision": "v1"}, "revision is 'v1', but the source is no dataset"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DataConfig, values, "data")
