from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from ot_ray.data import DataConfig, FileInfo, StreamConfig, resolved_revision, source_digest
from ot_ray.errors import ConfigError, DataError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that only knows which commit a revision is."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = re.fullmatch(r"/api/datasets/owner/name(?:/revision/(\w+))?", self.path.partition("?")[0])
            commit = COMMITS.get(found[1] or "main", found[1]) if found else None
            body = json.dumps({"id": "owner/name", "sha": commit}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("hub")
def test_a_dataset_on_the_hub_counts_by_its_commit() -> None:
    source = "hub:owner/name/part"
    assert resolved_revision(DataConfig(source=source)) == COMMITS["main"]
    assert resolved_revision(DataConfig(source=source, revision="v1")) == COMMITS["v1"]
    # A branch and the commit that it is at are the same text.
    assert digest(source) == digest(source, revision=COMMITS["main"]) != digest(source, revision="v1")


def test_only_the_hub_has_commits(tmp_path: Path) -> None:
    assert resolved_revision(DataConfig(source=f"hub:{tmp_path}")) is None
    assert resolved_revision(DataConfig(source=str(tmp_path))) is None


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        digest(tmp_path / "a.jsonl")
