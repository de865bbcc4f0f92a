"""What only a network does: lost answers, cut connections, busy servers, refusals."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy

from ot_ray.errors import (
    AlreadyExistsError,
    NotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from ot_ray.store import S3Store, open_store

PART = 5 * 1024 * 1024
BIG = bytes(range(256)) * 256 * 16 * 12 + b"tail"  # 12 MiB and a little: three parts


@pytest.fixture
def behind(proxied_url: str) -> S3Store:
    """A store behind the proxy, which tries three times."""
    store = open_store(proxied_url)
    assert isinstance(store, S3Store)
    return store


def test_busy_server_is_asked_again(behind: S3Store, proxy: FaultyProxy) -> None:
    proxy.faults.extend([503, 500])
    behind.write("x", b"1")
    proxy.faults.extend([503, 503])
    assert behind.read("x") == b"1"
    assert [seen.method for seen in proxy.seen] == ["PUT"] * 3 + ["GET"] * 3


def test_attempts_are_counted_once_and_the_message_helps(behind: S3Store, proxy: FaultyProxy) -> None:
    proxy.forever = 503
    with pytest.raises(StoreUnavailableError, match=r"3 of 3.*check that the endpoint") as caught:
        behind.read("some/key")
    assert f"{behind.address.place}/some/key at {proxy.url}" in str(caught.value)
    assert len(proxy.seen) == 3


def test_closed_port(s3_server: str) -> None:
    store = open_store("s3://bucket/x?endpoint_url=http://127.0.0.1:9&attempts=2&base_delay=0.01&timeout=2")
    for call in (lambda: store.read("x"), lambda: store.write("x", b""), lambda: list(store.list())):
        with pytest.raises(StoreUnavailableError, match=r"http://127\.0\.0\.1:9.*2 of 2"):
            call()


def test_server_that_never_answers(s3_server: str) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        store = open_store(f"s3://bucket?endpoint_url=http://127.0.0.1:{port}&attempts=2&base_delay=0&timeout=0.3")
        start = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="timeout"):
            store.read("x")
        assert time.monotonic() - start < 10


def test_backoff_grows(behind: S3Store, proxy: FaultyProxy, proxied_url: str) -> None:
    store = open_store(proxied_url.replace("base_delay=0.01", "base_delay=0.4"))
    proxy.forever = 503
    start = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        store.read("x")
    # 0.4 and 0.8 seconds, each shortened to no less than its half.
    assert time.monotonic() - start >= 0.6


def test_cut_download_goes_on_with_the_range_that_broke(behind: S3Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)
    behind.upload(tmp_path / "in", "big")
    proxy.seen.clear()
    proxy.method = "GET"
    proxy.faults.extend(["pass", ("cut", 1000)])
    behind.download("big", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == BIG
    starts = [seen.range.split("=")[1].split("-")[0] for seen in proxy.seen if seen.range]
    assert starts == ["0", str(PART), str(PART), str(2 * PART)]


def test_download_that_stays_broken_leaves_no_file(behind: S3Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)
    behind.upload(tmp_path / "in", "big")
    proxy.method = "GET"
    proxy.faults.append("pass")
    proxy.forever = ("cut", 1000)
    with pytest.raises(StoreUnavailableError):
        behind.download("big", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_object_replaced_during_a_download(behind: S3Store, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)
    behind.upload(tmp_path / "in", "big")
    with pytest.raises(StoreError, match="replaced meanwhile"):
        behind.download("big", tmp_path / "out", progress=lambda _: behind.write("big", BIG[::-1]))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_upload_survives_faults_in_every_request(behind: S3Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)
    # start; three parts, one answered too late; completion, whose answer is lost.
    proxy.faults.extend([503, "pass", "lose", "pass", 500, "pass", 503, "pass", "lose"])
    info = behind.upload(tmp_path / "in", "big")
    assert not proxy.faults
    assert behind.info("big") == info
    assert behind.read("big") == BIG


def test_failed_upload_leaves_no_parts_and_no_object(behind: S3Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)
    proxy.faults.extend(["pass", "pass", 503, 503, 503])
    with pytest.raises(StoreUnavailableError):
        behind.upload(tmp_path / "in", "big")
    assert list(behind.list()) == []
    assert "Uploads" not in behind._connect().list_multipart_uploads(Bucket=behind.address.bucket)


def test_file_that_changes_during_its_upload(behind: S3Store, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)

    def disturb(_: int) -> None:
        with (tmp_path / "in").open("r+b") as file:
            file.seek(len(BIG) - 4)
            file.write(b"head")

    with pytest.raises(StoreError, match="changed while it was uploaded"):
        behind.upload(tmp_path / "in", "big", disturb)
    assert not behind.exists("big")


def test_create_whose_answer_is_lost_still_wins(behind: S3Store, proxy: FaultyProxy) -> None:
    proxy.faults.append("lose")
    behind.create("v1", b"mine")
    assert behind.read("v1") == b"mine"
    proxy.faults.append("lose")
    with pytest.raises(AlreadyExistsError, match="v1"):
        behind.create("v1", b"theirs")


@pytest.mark.parametrize(("status", "kind", "message"), [(403, StoreError, "denied"), (507, StoreFullError, "full")])
def test_final_answers_are_not_tried_again(
    behind: S3Store, proxy: FaultyProxy, status: int, kind: type[StoreError], message: str
) -> None:
    proxy.forever = status
    for call in (lambda: behind.write("x", b""), lambda: behind.exists("x"), lambda: list(behind.list())):
        with pytest.raises(kind, match=message) as caught:
            call()
        assert not isinstance(caught.value, (StoreUnavailableError, NotFoundError))
    assert len(proxy.seen) == 3


def test_missing_bucket(s3_server: str, tmp_path: Path) -> None:
    store = open_store(f"s3://nobody-made-it/x?endpoint_url={s3_server}")
    (tmp_path / "in").write_bytes(b"")
    calls: list[Any] = [
        lambda: store.read("x"),
        lambda: store.exists("x"),
        lambda: store.info("x"),
        lambda: store.write("x", b""),
        lambda: store.create("x", b""),
        lambda: list(store.list()),
        lambda: store.delete_prefix("x"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="no such bucket; create it") as caught:
            call()
        assert not isinstance(caught.value, NotFoundError)


def test_missing_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    start = time.monotonic()
    with pytest.raises(StoreError, match="check boto3's credentials") as caught:
        open_store(s3_url).read("x")
    assert not isinstance(caught.value, StoreUnavailableError)
    assert time.monotonic() - start < 5


def test_unknown_profile(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(StoreError, match="nobodys"):
        open_store(s3_url).read("x")


@pytest.mark.slow
def test_list_and_delete_go_past_one_page(s3_url: str) -> None:
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    keys = [f"many/{number:04d}" for number in range(1003)]
    client = store._connect()

    def put(key: str) -> None:
        client.put_object(Bucket=store.address.bucket, Key=f"root/{key}", Body=b"")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, keys))
    assert list(store.list("many")) == keys
    store.write("other", b"")
    store.delete_prefix("many")
    assert list(store.list()) == ["other"]


def test_folder_markers_of_consoles_are_no_objects(s3_url: str) -> None:
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    store.write("a/x", b"")
    store._connect().put_object(Bucket=store.address.bucket, Key="root/a/", Body=b"")
    assert list(store.list()) == list(store.list("a")) == ["a/x"]


def test_threads_share_a_store(s3_url: str) -> None:
    store, failures = open_store(s3_url), []

    def work(me: int) -> None:
        try:
            store.write(f"t/{me}", b"%d" % me)
            assert store.read(f"t/{me}") == b"%d" % me
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
