from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from ot_ray.data import DataConfig, FileInfo, StreamConfig, source_digest
from ot_ray.errors import ConfigError, DataError


class Listing:
    """A bucket of which only the listing is read."""

    def __init__(self, *infos: FileInfo) -> None:
        self._infos = infos

    def list(self, prefix: str) -> Iterator[FileInfo]:
        return iter(self._infos)

    def open(self, key: str) -> BinaryIO:
        raise AssertionError("a digest reads no objects")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    (folder / "sub" / "b.txt").write_text("two")
    (folder / "notes.pdf").write_text("not read")
    return folder


def digest(source: object, files: Any = None, **values: Any) -> str:
    return source_digest(DataConfig(source=str(source), **values), files)


def test_it_names_content_wherever_it_lies(corpus: Path, tmp_path: Path) -> None:
    first = digest(corpus)
    assert re.fullmatch("[0-9a-f]{64}", first)
    copy = shutil.copytree(corpus, tmp_path / "elsewhere" / "copy")
    (copy / "notes.pdf").write_text("changed")
    assert digest(copy) == first
    assert digest(f"{copy}/**/*.[jt]*") == first
    (tmp_path / "renamed.jsonl").write_text('{"text": "one"}\n')
    assert digest(tmp_path / "renamed.jsonl") == digest(corpus / "a.jsonl")


def test_whatever_changes_the_text_changes_it(corpus: Path) -> None:
    seen = {digest(corpus)}
    for values in (
        {"limit": 1},
        {"text_field": "body"},
        {"document_separator": "\f"},
        {"format": "jsonl"},
        {"format": "text"},
    ):
        seen.add(digest(corpus, **values))
    (corpus / "sub" / "b.txt").write_text("twx")
    seen.add(digest(corpus))
    (corpus / "sub" / "b.txt").rename(corpus / "b.txt")
    seen.add(digest(corpus))
    (corpus / "a.jsonl").unlink()
    seen.add(digest(corpus))
    assert len(seen) == 9


def test_how_it_is_streamed_does_not_count(corpus: Path) -> None:
    config = StreamConfig(source=str(corpus), workers=0, passes=7, prefetch=9, shuffle_window=3)
    assert source_digest(config) == digest(corpus)


def test_a_bucket_counts_by_its_listing() -> None:
    one, two = FileInfo("c/a.jsonl", 10, "x"), FileInfo("c/b.jsonl", 10, "y")
    first = digest("s3://name/c?endpoint_url=http://a", Listing(one, two))
    assert digest("s3://other/c?endpoint_url=http://b", Listing(two, one)) == first
    others = [
        Listing(one),
        Listing(one, FileInfo("c/b.jsonl", 11, "y")),
        Listing(one, FileInfo("c/b.jsonl", 10, "z")),
        Listing(one, FileInfo("c/c.jsonl", 10, "y")),
    ]
    assert first not in {digest("s3://name/c", other) for other in others}
    with pytest.raises(DataError, match=r"s3://name/c/a\.jsonl: the bucket keeps no checksum"):
        digest("s3://name/c", Listing(FileInfo("c/a.jsonl", 10)))
    with pytest.raises(ConfigError, match="needs `files`"):
        digest("s3://name/c")


def test_a_dataset_in_a_folder_counts_by_content(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    first = digest(f"hub:{tmp_path}")
    assert digest(f"hub:{tmp_path}", split="test") != first
    (tmp_path / "train.jsonl").write_text('{"text": "two"}\n')
    assert digest(f"hub:{tmp_path}") != first


def test_a_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^hub:nobody/nothing/part: its commit cannot be learnt"):
        digest("hub:nobody/nothing/part")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        digest(tmp_path / "a.jsonl")
