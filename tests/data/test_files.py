from __future__ import annotations

import gzip
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import zstandard

from ot_ray.data import DataConfig, Example, FileInfo, bucket_address, load_sequences, open_stream, read_documents
from ot_ray.data.documents import Source
from ot_ray.data.readers import BEGINNING
from ot_ray.errors import ConfigError, DataError, NotFoundError
from tests.data.corpora import LENGTH, documents, jsonl, same, settings, word_tokenizer, write_corpus

ROWS = jsonl(documents(40))
IN_HIDDEN = ("corpus/.h/e.jsonl", "corpus/deep/.h/e.jsonl")
PACKED = {"gz": gzip.compress(ROWS), "zst": zstandard.compress(ROWS)}


class FolderFiles:
    """A bucket that is a folder: keys are paths below it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self, prefix: str) -> Iterator[FileInfo]:
        path = self.folder / prefix
        for entry in [path] if path.is_file() else sorted(path.rglob("*")):
            if entry.is_file():
                yield FileInfo(entry.relative_to(self.folder).as_posix(), entry.stat().st_size, str(len(entry.name)))

    def open(self, key: str) -> BinaryIO:
        path = self.folder / key
        if not path.exists():
            raise NotFoundError(f"no object {key}")
        return path.open("rb")


def texts(source: object, files: Any = None, **settings: Any) -> list[str]:
    found = read_documents(DataConfig(source=str(source), **settings), files)
    return [document.segments[0].text for document in found if isinstance(document, Example)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_are_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain" / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "packed" / f"a.jsonl.{suffix}").write_bytes(PACKED[suffix])
    (tmp_path / "plain" / "b.txt").write_bytes("ä\r\nb".encode())
    pack = gzip.compress if suffix == "gz" else zstandard.compress
    (tmp_path / "packed" / f"b.txt.{suffix}").write_bytes(pack("ä\r\nb".encode()))
    assert texts(tmp_path / "packed") == texts(tmp_path / "plain")
    assert len(texts(tmp_path / "packed")) == 41
    assert texts(tmp_path / "packed", format="text") == ["ä\nb"]
    (tmp_path / f"x.data.{suffix}").write_bytes(PACKED[suffix])
    assert len(texts(tmp_path / f"x.data.{suffix}", format="jsonl")) == 40


def test_archives_of_several_frames_and_blocks(tmp_path: Path) -> None:
    large = ROWS * 200
    frames = [large[start : start + 100_000] for start in range(0, len(large), 100_000)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, frames)))
    # A frame that holds no data, as archives that can be searched have.
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(large) + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc")
    for name in ("a.jsonl.zst", "b.jsonl.gz", "c.jsonl.zst"):
        assert len(texts(tmp_path / name)) == 8000


def test_an_empty_archive_holds_no_documents(tmp_path: Path) -> None:
    for name, data in (("a.jsonl.zst", zstandard.compress(b"")), ("a.txt.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: the file holds no documents"):
            texts(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_archives_that_are_cut_off_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"a.{kind}.{suffix}"
    for size in (2, 11, len(PACKED[suffix]) // 2, len(PACKED[suffix]) - 1):
        path.write_bytes(PACKED[suffix][:size])
        with pytest.raises(DataError, match=rf"a\.{kind}\.{suffix}.*: the .* data ends early; copy the file again"):
            texts(path)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_archives_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    content = bytearray(PACKED[suffix])
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}"):
        texts(path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: the .* data is damaged"):
        texts(path)


def test_a_cut_off_archive_says_after_which_line(tmp_path: Path) -> None:
    whole = zstandard.compress(ROWS)
    (tmp_path / "a.jsonl.zst").write_bytes(whole + whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst, after line 40: the zstd data ends early"):
        texts(tmp_path / "a.jsonl.zst")


def test_parquet_is_not_read_through_a_compression(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.parquet\.gz: Parquet compresses by itself"):
        texts(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "text", "parquet", "hub"])
def test_reading_starts_at_any_record(tmp_path: Path, kind: str) -> None:
    source = Source(settings(write_corpus(tmp_path / "corpus", kind, documents(30), files=1), document_separator="\f"))
    records = list(source.records(0, BEGINNING, 20))
    assert len(records) >= 30
    for start, record in enumerate(records):
        assert list(source.records(0, record.place, 20)) == records[start:]
        assert record.size > 0


@pytest.fixture
def bucket(tmp_path: Path) -> FolderFiles:
    folder = tmp_path / "bucket"
    (folder / "corpus" / "deep").mkdir(parents=True)
    for name in (
        "corpus/a.jsonl",
        "corpus/b.txt",
        "corpus/deep/c.jsonl",
        "corpus/.hidden.jsonl",
        "corpora.jsonl",
        *IN_HIDDEN,
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jsonl([{"text": name}]) if name.endswith("jsonl") else name.encode())
    (folder / "corpus" / "d.jsonl.zst").write_bytes(zstandard.compress(jsonl([{"text": "corpus/d.jsonl.zst"}])))
    (folder / "corpus" / "image.png").write_bytes(b"")
    return FolderFiles(folder)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("corpus", ["corpus/a.jsonl", "corpus/b.txt", "corpus/d.jsonl.zst", "corpus/deep/c.jsonl"]),
        ("corpus/", ["corpus/a.jsonl", "corpus/b.txt", "corpus/d.jsonl.zst", "corpus/deep/c.jsonl"]),
        ("corpus/a.jsonl", ["corpus/a.jsonl"]),
        ("corpus/*.jsonl", ["corpus/a.jsonl"]),
        ("corpus/.*.jsonl", ["corpus/.hidden.jsonl"]),
        ("corpus/.h", ["corpus/.h/e.jsonl"]),
        ("corpus/.h/*.jsonl", ["corpus/.h/e.jsonl"]),
        ("corpus/*/*.jsonl", ["corpus/deep/c.jsonl"]),
        ("corpus/**/*.jsonl", ["corpus/a.jsonl", "corpus/deep/c.jsonl"]),
        ("corpus/[a-c].*", ["corpus/a.jsonl", "corpus/b.txt"]),
        ("**/[!.]*.jsonl*", ["corpora.jsonl", "corpus/a.jsonl", "corpus/d.jsonl.zst", "corpus/deep/c.jsonl"]),
    ],
)
def test_paths_in_a_bucket(bucket: FolderFiles, path: str, expected: list[str]) -> None:
    assert texts(f"s3://name/{path}?endpoint_url=http://x", bucket) == expected
    # A folder of this machine is read alike.
    assert sorted(texts(bucket.folder / path)) == sorted(expected)


def test_sources_in_a_bucket_that_do_not_serve(bucket: FolderFiles) -> None:
    with pytest.raises(ConfigError, match=r"in a bucket \(s3://name/corpus\), which needs `files`"):
        texts("s3://name/corpus?region=x")
    with pytest.raises(DataError, match=r"^s3://name/nothing/\*: no file matches"):
        texts("s3://name/nothing/*?region=x", bucket)
    with pytest.raises(DataError, match=r"^s3://name/nothing: the folder holds no"):
        texts("s3://name/nothing?region=x", bucket)
    with pytest.raises(DataError, match=r"^s3://name/corpus/image\.png: cannot tell the format"):
        texts("s3://name/corpus/image.png", bucket)


def test_an_object_that_is_gone_is_named(bucket: FolderFiles) -> None:
    found = read_documents(DataConfig(source="s3://name/corpus"), bucket)
    next(found)
    (bucket.folder / "corpus" / "b.txt").unlink()
    with pytest.raises(DataError, match=r"^s3://name/corpus/b\.txt: the file is no longer there"):
        list(found)


def test_the_address_of_a_bucket() -> None:
    assert bucket_address("s3://name/a/b*.jsonl?region=x&attempts=2") == "s3://name?region=x&attempts=2"
    assert bucket_address("s3://name") == "s3://name"


def test_a_bucket_serves_streams_and_sets_in_memory_like_a_folder(tmp_path: Path) -> None:
    write_corpus(tmp_path / "bucket", "jsonl.zst", documents(40))
    files = pickle.loads(pickle.dumps(FolderFiles(tmp_path)))
    there, here = settings("s3://name/bucket/*.zst?region=x"), settings(tmp_path / "bucket")
    tokenizer = word_tokenizer()
    assert load_sequences(there, tokenizer, LENGTH, files).digest == load_sequences(here, tokenizer, LENGTH).digest
    streams = [
        open_stream(there, tokenizer, LENGTH, 3, 1, files=files),
        open_stream(here, tokenizer, LENGTH, 3, 1),
    ]
    given, expected = ([stream.next_batch() for _ in range(8)] for stream in streams)
    assert same(given, expected)
