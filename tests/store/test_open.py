"""URLs of stores: what each opens, what is refused, and that no secret gets into a message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ot_ray.errors import ConfigError
from ot_ray.store import LocalStore, S3Address, S3Store, open_store


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of")
    for url, root in {
        "here": tmp_path / "here",
        str(tmp_path): tmp_path,
        "~/x": Path("/home/of/x"),
        "file:///data/a%20b": Path("/data/a b"),
        "file://localhost/data": Path("/data"),
    }.items():
        store = open_store(url)
        assert isinstance(store, LocalStore)
        assert store.root == root


def test_s3_url_round_trip() -> None:
    url = "s3://my-bucket/a/b%20c?endpoint_url=http%3A%2F%2Flocalhost%3A9000&region=eu-west-1&attempts=7&timeout=2.5"
    store = open_store(url)
    assert isinstance(store, S3Store)
    assert store.url == url
    assert store.address == S3Address(
        bucket="my-bucket",
        prefix="a/b c",
        endpoint_url="http://localhost:9000",
        region="eu-west-1",
        attempts=7,
        timeout=2.5,
    )
    assert open_store("s3://my-bucket/?endpoint_url=http://h:1").url == "s3://my-bucket?endpoint_url=http%3A%2F%2Fh%3A1"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "file:///folder"),
        ("gs://bucket", "gs://.*s3://bucket"),
        ("s3:/bucket", "s3://bucket"),
        ("file:/x", "file:///"),
        ("file://host/x", "local folder"),
        ("s3://", "bucket"),
        ("s3://b/../x", "prefix"),
        ("s3://bucket?endpoint=http://x", "endpoint_url"),
        ("s3://bucket?attempts=0", "attempts"),
        ("s3://bucket?attempts=many", "attempts"),
        ("s3://bucket?timeout=-1", "timeout"),
        ("s3://bucket?part_size=1024", "part_size"),
        ("s3://bucket?endpoint_url=localhost:9000", "http://host:port"),
        ("s3://bucket?endpoint_url=http://under_score:9000", "without underscores"),
        ("s3://bucket?endpoint_url=http://host:99999", "endpoint_url"),
        ("s3://bucket?region=a&region=b", "repeated"),
        ("s3://bucket?prefix=x", "wrong place"),
        ("s3://[bucket", "cannot be read"),
    ],
)
def test_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAHUSH:hush/hush@bucket/x",
        "s3://AKIAHUSH:hush@bucket",
        "s3://bucket?endpoint_url=http://AKIAHUSH:hush@host",
        "s3://bucket?aws_secret_access_key=hush",
        "http://AKIAHUSH:hush@host/x",
    ],
)
def test_credentials_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert "hush" not in str(caught.value).lower()


def test_base_install_opens_folders_and_names_the_extra_for_s3() -> None:
    script = """
import sys
sys.modules["boto3"] = sys.modules["botocore"] = None  # what an install without them looks like to import
from ot_ray.errors import MissingDependencyError
from ot_ray.store import open_store
open_store("folder")
try:
    open_store("s3://bucket").exists("x")
except MissingDependencyError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "pip install 'ot_ray[platform]'" in result.stdout, result.stderr
