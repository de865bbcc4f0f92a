"""Text in a bucket, over a real S3 server: the same bytes and the same documents as from a folder."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
from urllib.parse import urlsplit

import pytest

from ot_ray.data import DataConfig, read_documents
from ot_ray.errors import DataError, NotFoundError
from ot_ray.store import open_store
from ot_ray.training import text_source
from ot_ray.training.text_source import StoreFiles, files_of


@pytest.fixture
def bucket(s3_url):
    """The address of a whole bucket, and what makes an address of a path in it."""
    parts = urlsplit(s3_url)
    return lambda path: f"s3://{parts.netloc}/{path}?{parts.query}"


def test_a_stream_reads_seeks_and_ends_like_a_file(bucket, monkeypatch):
    monkeypatch.setattr(text_source, "BLOCK", 1000)
    content = os.urandom(10_500)
    open_store(bucket("text")).write("a.bin", content)
    files = StoreFiles(open_store(bucket("text")))
    expected = io.BytesIO(content)
    with files.open("a.bin") as stream:
        for move in (lambda s: s.read(10), lambda s: s.seek(9_990), lambda s: s.read(20), lambda s: s.seek(-5, 2)):
            assert move(stream) == move(expected)
        assert stream.read() == content[-5:] and stream.read() == b""
        stream.seek(0)
        assert stream.read() == content


def test_documents_of_a_bucket_are_those_of_a_folder(bucket, tmp_path):
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)).encode()
    store = open_store(bucket(""))
    for name, data in (("corpus/a.jsonl", lines), ("corpus/deep/b.jsonl.gz", gzip.compress(lines))):
        store.write(name, data)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    there = DataConfig(source=bucket("corpus"))
    documents = list(read_documents(there, files_of(there)))
    here = list(read_documents(DataConfig(source=str(tmp_path / "corpus"))))
    assert len(documents) == 100
    assert [document.segments for document in documents] == [document.segments for document in here]
    pattern = DataConfig(source=bucket("corpus/*.jsonl"))
    assert len(list(read_documents(pattern, files_of(pattern)))) == 50


def test_listing_tells_size_and_content(bucket):
    store = open_store(bucket(""))
    store.write("corpus/a.txt", b"one")
    first = list(StoreFiles(store).list("corpus"))
    store.write("corpus/a.txt", b"two")
    second = list(StoreFiles(store).list("corpus/a.txt"))
    assert (
        [(info.key, info.size) for info in first] == [(info.key, info.size) for info in second] == [("corpus/a.txt", 3)]
    )
    assert first[0].etag and second[0].etag and first[0].etag != second[0].etag


def test_it_travels_to_worker_processes(bucket):
    open_store(bucket("")).write("a.txt", b"hello")
    files = files_of(DataConfig(source=bucket("a.txt")), patience_s=1.0)
    with pickle.loads(pickle.dumps(files)).open("a.txt") as stream:
        assert stream.read() == b"hello"


def test_what_is_not_there_is_said(bucket):
    nothing = DataConfig(source=bucket("nothing/*.jsonl"))
    with pytest.raises(DataError, match="nothing"):
        list(read_documents(nothing, files_of(nothing)))
    with pytest.raises(NotFoundError):
        StoreFiles(open_store(bucket(""))).open("gone.txt")


def test_other_sources_need_no_opener(tmp_path):
    assert files_of(DataConfig(source=str(tmp_path))) is None
    assert files_of(DataConfig(source="hub:owner/name")) is None
