"""The file of a job's credentials: who may read it, what may stand in it, and that a new one is used at once."""

from __future__ import annotations

import dataclasses
import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from ot_ray.errors import AlreadyExistsError, ConfigError, NotFoundError, StoreError
from ot_ray.store import LocalStore, PatientStore, S3Address, S3Store, open_store, renewed
from ot_ray.store.s3_session import Credentials, CredentialsFile, boto_session

GIVEN = Credentials("ID-1", "the-secret", "the-token", expires_at=900, lasts_s=900.0)


def test_a_file_is_for_its_owner_and_shows_the_new_ones_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    GIVEN.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(AlreadyExistsError):
        GIVEN.write(path)
    file = CredentialsFile(path)
    assert file.current() == GIVEN
    following = dataclasses.replace(GIVEN, access_key_id="ID-2")
    following.replace(path)
    assert file.key_id() == "ID-2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*tmp_path.iterdir()] == [path]


def test_every_request_is_signed_with_what_the_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-somebody-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    path = tmp_path / "file"
    GIVEN.write(path)
    credentials = boto_session(CredentialsFile(path)).get_credentials()
    assert [*credentials.get_frozen_credentials()][:3] == ["ID-1", "the-secret", "the-token"]
    Credentials("ID-2", "b", "c", 900, 900.0).replace(path)
    assert [*credentials.get_frozen_credentials()][:3] == ["ID-2", "b", "c"]


def _changed(**changes: Any) -> bytes:
    return json.dumps({**dataclasses.asdict(GIVEN), **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe the-secret",
        b"[" * 100_000,
        b'"the-secret"',
        b'{"access_key_id": "the-secret"}',
        _changed(more="the-secret"),
        _changed(access_key_id=""),
        _changed(session_token=None),
        _changed(secret_access_key="x" * 10_000),
        _changed(expires_at=1.5),
        _changed(expires_at=True),
        _changed(lasts_s=900),
        _changed(lasts_s=-1.0),
        _changed(lasts_s=float("inf")),
        _changed(lasts_s=float("nan")),
    ],
    ids=range(15),
)
def test_what_is_no_file_of_credentials_is_refused_and_not_shown(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(StoreError, match="no credentials that can be read") as caught:
        CredentialsFile(path).current()
    assert "the-secret" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        CredentialsFile(tmp_path / "file").current()
    store = open_store(f"s3://data/root?credentials={tmp_path}/file")
    with pytest.raises(NotFoundError, match="file"):
        store.read("x")


def test_the_address_says_where_the_file_is() -> None:
    address = S3Address.parse("s3://data/root?credentials=credentials.json")
    assert address.credentials == "credentials.json"
    assert S3Address.parse(address.url) == address
    with pytest.raises(ConfigError, match="credentials"):
        S3Address.parse("s3://data/root?credentials=")


def test_stores_without_such_a_file_are_left_alone(tmp_path: Path) -> None:
    before = threading.active_count()
    for store in (LocalStore(tmp_path), PatientStore(LocalStore(tmp_path), 1.0), S3Store(S3Address(bucket="data"))):
        with renewed(store):
            assert threading.active_count() == before
    # Nor is one whose file is renewed by others.
    GIVEN.write(tmp_path / "file")
    with renewed(S3Store(S3Address(bucket="data", credentials=str(tmp_path / "file")))):
        assert threading.active_count() == before
