"""Files over HTTP as a customer meets them: OpenAI's client, paging, ranges, names, limits, and other tenants."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi.testclient import TestClient
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types import FileObject

from ot_ray.store import LocalStore, open_store
from serve.catalogue import Catalogue
from serve.service import Service
from serve.stored_files import RESERVED_S, TenantFullError, drop_file, keep_file, sweep_files
from tests.service.conftest import clients

ClientOf = Callable[..., TestClient]
LINES = b'{"prompt": "2 + 2 =", "completion": " 4"}\n' * 12


def sdk(client: TestClient) -> OpenAI:
    """OpenAI's own client, whose requests go to the application in this process."""
    key = client.headers["authorization"].removeprefix("Bearer ")
    return OpenAI(api_key=key, base_url="http://testserver/v1", http_client=client, max_retries=0)


def upload(client: TestClient, data: bytes = LINES, name: str = "train.jsonl", **fields: str) -> dict[str, Any]:
    answer = client.post("/v1/files", data={"purpose": "fine-tune", **fields}, files={"file": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stored(service: Service) -> list[str]:
    assert service.store is not None
    return list(service.store.list("files"))


def test_openais_client_creates_reads_lists_and_deletes(client_of: ClientOf, service: Service) -> None:
    client = sdk(client_of("anna"))
    before = int(time.time())
    file = client.files.create(file=("train.jsonl", LINES), purpose="fine-tune")
    FileObject.model_validate(file.model_dump(), strict=True)
    assert file.object == "file" and file.purpose == "fine-tune" and file.filename == "train.jsonl"
    assert file.bytes == len(LINES) and before <= file.created_at <= time.time() and file.expires_at is None
    assert file.status == "processed" and file.id.startswith("file-")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == LINES
    assert [item.id for item in client.files.list()] == [file.id]
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    for call in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(NotFoundError) as caught:
            call(file.id)
        assert caught.value.body == {
            "message": f"No such File object: {file.id}",
            "type": "invalid_request_error",
            "param": "id",
            "code": None,
        }
    assert list(client.files.list()) == [] and stored(service) == []


def test_expiry_is_counted_from_creation_and_swept(client_of: ClientOf, service: Service, database_url: str) -> None:
    client = sdk(client_of("anna"))
    file = client.files.create(
        file=("a.jsonl", LINES), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    assert service.store is not None and service.catalogue is not None
    assert sweep_files(service.catalogue, service.store) == 0 and len(stored(service)) == 1
    later = Catalogue.open(database_url, clock=lambda: time.time() + 3601)
    assert sweep_files(later, service.store) == 1
    later.close()
    assert stored(service) == [] and list(client.files.list()) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"}, "expires_after"),
        ({"expires_after[anchor]": "last_active_at", "expires_after[seconds]": "3600"}, "expires_after"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after": "3600"}, "expires_after"),
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_fields_that_make_no_sense_are_named(client_of: ClientOf, fields: dict[str, str], param: str) -> None:
    data = {"purpose": "fine-tune", **fields}
    answer = client_of("anna").post("/v1/files", data=data, files={"file": ("a.jsonl", LINES)})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert answer.headers["x-should-retry"] == "false"


def test_pages_go_through_all_files_once_in_both_orders(client_of: ClientOf) -> None:
    client = client_of("anna")
    made = [upload(client, name=f"{number}.jsonl")["id"] for number in range(5)]
    assert [file.id for file in sdk(client).files.list(limit=2)] == made[::-1]
    assert [file.id for file in sdk(client).files.list(limit=2, order="asc")] == made
    page = client.get("/v1/files?limit=2&order=asc").json()
    assert list(page) == ["object", "data", "first_id", "last_id", "has_more"]
    assert page["object"] == "list" and page["has_more"] is True
    assert (page["first_id"], page["last_id"]) == (made[0], made[1])
    last = client.get(f"/v1/files?limit=2&order=asc&after={made[3]}").json()
    assert [item["id"] for item in last["data"]] == made[4:] and last["has_more"] is False
    none = client.get("/v1/files?purpose=fine-tune-results").json()
    assert none == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert len(client.get("/v1/files?purpose=fine-tune").json()["data"]) == 5


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("limit=0", 400, "limit"),
        ("limit=10001", 400, "limit"),
        ("limit=ten", 400, "limit"),
        ("order=up", 400, "order"),
        ("after=file-000000000000000000000000", 404, "after"),
        ("after=%00%F0%9F%92%A9%EF%BF%BD", 404, "after"),
        (f"after={'x' * 200}", 400, "after"),
    ],
)
def test_a_list_that_cannot_be_is_refused(client_of: ClientOf, query: str, status: int, param: str) -> None:
    answer = client_of("anna").get(f"/v1/files?{query}")
    assert answer.status_code == status and answer.json()["error"]["param"] == param


def test_another_tenants_file_is_as_unknown_as_any(client_of: ClientOf) -> None:
    anna, ben = client_of("anna"), client_of("ben")
    file_id = upload(anna)["id"]
    unknown = "file-" + "0" * 24
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("HEAD", "/content")):
        foreign = ben.request(method, f"/v1/files/{file_id}{path}")
        nowhere = ben.request(method, f"/v1/files/{unknown}{path}")
        assert foreign.status_code == nowhere.status_code == 404
        assert foreign.text.replace(file_id, unknown) == nowhere.text
    foreign, nowhere = (ben.get(f"/v1/files?after={cursor}") for cursor in (file_id, unknown))
    assert foreign.status_code == 404 and foreign.text.replace(file_id, unknown) == nowhere.text
    assert ben.get("/v1/files").json()["data"] == []
    assert anna.get(f"/v1/files/{file_id}/content").content == LINES


def test_a_key_needs_the_scope(client_of: ClientOf, service: Service) -> None:
    keyless = client_of(None)
    assert keyless.get("/v1/files").status_code == 401
    answer = keyless.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", LINES)})
    assert answer.status_code == 401
    other = client_of("anna", scopes=("inference",))
    answer = other.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", LINES)})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "insufficient_permissions"
    assert stored(service) == []


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "..\\..\\boot.ini",
        "a\tb\x7f.jsonl",
        "train.jsonl; filename=other.exe",
        'quo"ted.jsonl',
        "\u202egpj.lnosj",
        "zero\u200bwidth.jsonl",
        "Trainingsdaten für Übung №1 🦊.jsonl",
        ".part-hidden",
        "con",
        "-rf *",
        "x" * 500,
    ],
)
def test_a_name_is_kept_as_data_and_never_becomes_a_path(
    client_of: ClientOf, service: Service, tmp_path: Path, name: str
) -> None:
    client = client_of("anna")
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "store")}
    quoted = name.encode().replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    body = form(b'Content-Disposition: form-data; name="file"; filename="' + quoted + b'"')
    answer = client.post("/v1/files", content=body, headers=FORM_TYPE)
    assert answer.status_code == 200, answer.text
    file = answer.json()
    assert file["filename"] == name
    assert client.get(f"/v1/files/{file['id']}").json()["filename"] == name
    [key] = stored(service)
    assert key.split("/")[0] == "files" and key.split("/")[2] == file["id"]
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "store")}
    assert {path.name for path in after - before} <= {"service.sqlite-wal", "service.sqlite-shm"}
    header = client.get(f"/v1/files/{file['id']}/content").headers["content-disposition"]
    assert header.isascii() and header.isprintable()
    parsed = Message()
    parsed["content-disposition"] = header
    fallback, wide = parsed.get_param("filename", header="content-disposition"), header.split("''")[1]
    assert unquote(wide) == name
    assert parsed.get_content_disposition() == "attachment"
    assert isinstance(fallback, tuple | str)


FORM_TYPE = {"content-type": "multipart/form-data; boundary=B"}


def form(disposition: bytes, data: bytes = LINES) -> bytes:
    purpose = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    return purpose + b"--B\r\n" + disposition + b"\r\n\r\n" + data + b"\r\n--B--\r\n"


@pytest.mark.parametrize(
    ("asked", "status", "expected", "content_range"),
    [
        ("bytes=0-0", 206, slice(0, 1), "bytes 0-0/{size}"),
        ("bytes=10-19", 206, slice(10, 20), "bytes 10-19/{size}"),
        ("bytes=10-", 206, slice(10, None), "bytes 10-{last}/{size}"),
        ("bytes=0-", 206, slice(0, None), "bytes 0-{last}/{size}"),
        ("bytes=-5", 206, slice(-5, None), "bytes {minus5}-{last}/{size}"),
        ("bytes=-999999", 206, slice(0, None), "bytes 0-{last}/{size}"),
        ("bytes=5-999999", 206, slice(5, None), "bytes 5-{last}/{size}"),
        ("bytes=20-10", 200, slice(0, None), None),
        ("bytes=0-1,4-5", 200, slice(0, None), None),
        ("lines=1-2", 200, slice(0, None), None),
        ("bytes=a-b", 200, slice(0, None), None),
    ],
)
def test_ranges(client_of: ClientOf, asked: str, status: int, expected: slice, content_range: str | None) -> None:
    client = client_of("anna")
    place = f"/v1/files/{upload(client)['id']}/content"
    answer = client.get(place, headers={"range": asked})
    size = len(LINES)
    assert answer.status_code == status
    assert answer.content == LINES[expected]
    assert answer.headers["content-length"] == str(len(LINES[expected]))
    told = content_range and content_range.format(size=size, last=size - 1, minus5=size - 5)
    assert answer.headers.get("content-range") == told


def test_a_range_beyond_the_end_and_conditions(client_of: ClientOf) -> None:
    client = client_of("anna")
    place = f"/v1/files/{upload(client)['id']}/content"
    for asked in (f"bytes={len(LINES)}-", "bytes=-0", "bytes=99999999-99999999"):
        answer = client.get(place, headers={"range": asked})
        assert answer.status_code == 416 and answer.headers["content-range"] == f"bytes */{len(LINES)}"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    whole = client.get(place)
    etag = whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes" and whole.headers["x-content-type-options"] == "nosniff"
    assert client.get(place, headers={"if-none-match": f'"x", W/{etag}'}).status_code == 304
    assert client.get(place, headers={"range": "bytes=0-3", "if-range": etag}).content == LINES[:4]
    assert client.get(place, headers={"range": "bytes=0-3", "if-range": '"other"'}).content == LINES
    head = client.head(place)
    assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == str(len(LINES))


def test_a_replay_needs_no_room(client_of: ClientOf, service: Service) -> None:
    client, data = client_of("anna"), b"\n" * 100_000
    catalogue = service.catalogue
    assert catalogue is not None
    catalogue.tenants.change_limits(catalogue.tenants.named("anna").id, {"file_bytes": len(data)})

    def send(key: str) -> Any:
        files = {"file": ("a.jsonl", data)}
        return client.post("/v1/files", data={"purpose": "fine-tune"}, files=files, headers={"idempotency-key": key})

    first, again, other = send("a"), send("a"), send("b")
    assert first.status_code == again.status_code == 200 and again.json() == first.json()
    assert other.status_code == 400 and other.json()["error"]["code"] == "storage_limit_exceeded"
    assert len(stored(service)) == 1


def test_large_content_comes_in_pieces_and_whole(client_of: ClientOf) -> None:
    client = client_of("anna")
    data = b"".join(b"%09d\n" % number for number in range(1_000_000))
    place = f"/v1/files/{upload(client, data)['id']}/content"
    assert client.get(place).content == data
    assert client.get(place, headers={"range": "bytes=4194300-8388617"}).content == data[4194300:8388618]


def test_what_a_tenant_may_keep_is_counted_over_all_files(client_of: ClientOf, service: Service) -> None:
    client, ben = client_of("anna"), client_of("ben")
    catalogue = service.catalogue
    assert catalogue is not None
    anna = catalogue.tenants.named("anna")
    catalogue.tenants.change_limits(anna.id, {"file_bytes": 2 * len(LINES) + 5})
    first = upload(client)
    upload(client)
    answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", LINES)})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "storage_limit_exceeded"
    assert len(stored(service)) == 2
    upload(ben)
    client.delete(f"/v1/files/{first['id']}")
    upload(client)
    with pytest.raises(BadRequestError, match="Delete files first"):
        sdk(client).files.create(file=("big.jsonl", b"x" * 200_000), purpose="fine-tune")


def test_the_same_request_again_gives_the_same_file(client_of: ClientOf, service: Service) -> None:
    client = client_of("anna")
    key = {"idempotency-key": "5f3c"}

    def send(data: bytes = LINES, **fields: str) -> Any:
        files = {"file": ("a.jsonl", data)}
        return client.post("/v1/files", data={"purpose": "fine-tune", **fields}, files=files, headers=key)

    first, again = send(), send()
    assert first.status_code == again.status_code == 200 and again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in first.headers
    assert len(stored(service)) == 1
    assert send(LINES + b"\n").status_code == 422
    assert send(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}).status_code == 422
    assert upload(client)["id"] != first.json()["id"]
    bad = client.post("/v1/files", data={"purpose": "x"}, files={"file": ("a", b"1")}, headers={"idempotency-key": "b"})
    assert bad.status_code == 400
    good = client.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", b"1")}, headers={"idempotency-key": "b"}
    )
    assert good.status_code == 200


def test_creating_and_deleting_leave_lines_in_the_audit_log(client_of: ClientOf, service: Service) -> None:
    client = client_of("anna")
    file_id = upload(client)["id"]
    client.delete(f"/v1/files/{file_id}")
    assert service.catalogue is not None
    lines = [(line.action, line.target) for line in service.catalogue.audit.list(limit=10).items]
    assert set(lines) >= {("file.create", file_id), ("file.delete", file_id)}


class BrokenStore(LocalStore):
    """A folder whose disk fails at a chosen method."""

    broken = ""

    def upload(self, *arguments: Any, **named: Any) -> Any:
        self._fail("upload")
        info = super().upload(*arguments, **named)
        self._fail("after upload")
        return info

    def delete(self, key: str) -> None:
        self._fail("delete")
        super().delete(key)

    def _fail(self, what: str) -> None:
        if what == self.broken:
            raise OSError("the disk is gone")


def kept_by(catalogue: Catalogue, store: LocalStore, tenant: str) -> tuple[int, int, int]:
    """Files that a tenant sees, objects in the store, bytes that count."""
    return len(catalogue.files.list(tenant).items), len(list(store.list())), catalogue.files.kept_bytes(tenant)


def of_lines(tenant: str) -> dict[str, Any]:
    """What `keep_file` is told of a file that holds LINES."""
    what = {"tenant_id": tenant, "filename": "a\x1f\u202e.jsonl", "purpose": "fine-tune", "size": len(LINES)}
    return {**what, "sha256": hashlib.sha256(LINES).hexdigest()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of this machine that holds LINES."""
    (tmp_path / "data").write_bytes(LINES)
    return tmp_path / "data"


def test_nothing_is_half_kept_when_the_store_fails(any_catalogue: Catalogue, tmp_path: Path, path: Path) -> None:
    store, tenant = BrokenStore(tmp_path / "store"), any_catalogue.tenants.create("anna").id
    what = of_lines(tenant)
    for broken in ("upload", "after upload"):
        store.broken = broken
        with pytest.raises(OSError, match="the disk is gone"):
            keep_file(any_catalogue, store, path, **what)
        assert kept_by(any_catalogue, store, tenant) == (0, 0, 0)
    store.broken = ""
    with pytest.raises(OSError, match="changed on its way"):
        keep_file(any_catalogue, store, path, **{**what, "sha256": "0" * 64})
    assert kept_by(any_catalogue, store, tenant) == (0, 0, 0)

    file = keep_file(any_catalogue, store, path, **what)
    assert kept_by(any_catalogue, store, tenant) == (1, 1, len(LINES))
    assert any_catalogue.files.get(tenant, file.id).filename == what["filename"]
    store.broken = "delete"
    with pytest.raises(OSError, match="the disk is gone"):
        drop_file(any_catalogue, store, tenant, file.id)
    assert kept_by(any_catalogue, store, tenant) == (0, 1, 0)
    store.broken = ""
    assert sweep_files(any_catalogue, store) == 1
    assert kept_by(any_catalogue, store, tenant) == (0, 0, 0)


def test_the_same_id_twice_at_once_is_one_file(any_catalogue: Catalogue, store: LocalStore, path: Path) -> None:
    tenant = any_catalogue.tenants.create("anna").id
    file_id = "file-" + "a" * 24
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(keep_file, any_catalogue, store, path, file_id=file_id, **of_lines(tenant)) for _ in "1234"
        ]
        files = [call.result() for call in calls]
    assert {file.id for file in files} == {file_id}
    assert kept_by(any_catalogue, store, tenant) == (1, 1, len(LINES))
    assert sweep_files(any_catalogue, store) == 0


def test_uploads_at_once_do_not_pass_the_limit_together(
    any_catalogue: Catalogue, store: LocalStore, path: Path
) -> None:
    tenant, most = any_catalogue.tenants.create("anna").id, 3 * len(LINES)

    def keep() -> bool:
        try:
            keep_file(any_catalogue, store, path, most_bytes=most, **of_lines(tenant))
        except TenantFullError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        kept = [call.result() for call in [pool.submit(keep) for _ in range(8)]]
    assert sum(kept) == 3
    assert kept_by(any_catalogue, store, tenant) == (3, 3, most)


def test_an_upload_whose_server_died_is_swept_after_its_time_and_not_before(
    any_catalogue: Catalogue, store: LocalStore, any_database_url: str
) -> None:
    tenant = any_catalogue.tenants.create("anna").id
    reserved = any_catalogue.files.create(
        tenant, filename="a", bytes=3, sha256="0", purpose="fine-tune", reserved_s=RESERVED_S
    )
    assert reserved is not None
    store.write(f"files/{tenant}/{reserved.id}", b"abc")
    assert kept_by(any_catalogue, store, tenant) == (0, 1, 3)
    assert sweep_files(any_catalogue, store) == 0
    later = Catalogue.open(any_database_url, clock=lambda: time.time() + RESERVED_S + 1)
    assert not later.files.confirm(reserved.id)
    assert sweep_files(later, store) == 1
    later.close()
    assert kept_by(any_catalogue, store, tenant) == (0, 0, 0)


class InTheMeantime(LocalStore):
    """A folder; while the first object is deleted, something else is done."""

    meanwhile: Callable[[], object] | None = None

    def delete(self, key: str) -> None:
        super().delete(key)
        then, self.meanwhile = self.meanwhile, None
        if then is not None:
            then()


def test_a_sweep_spares_what_was_made_anew_under_the_same_id(
    any_catalogue: Catalogue, tmp_path: Path, path: Path
) -> None:
    store, tenant = InTheMeantime(tmp_path / "store"), any_catalogue.tenants.create("anna").id
    ids = [keep_file(any_catalogue, store, path, **of_lines(tenant)).id for _ in range(2)]
    for file_id in ids:
        any_catalogue.files.delete(tenant, file_id)
    first, second = (file.id for file in any_catalogue.files.doomed())

    def again() -> None:
        any_catalogue.files.erase(second)
        keep_file(any_catalogue, store, path, file_id=second, **of_lines(tenant))

    store.meanwhile = again
    assert sweep_files(any_catalogue, store) == 1
    assert any_catalogue.files.get(tenant, second).id == second != first
    assert store.read(f"files/{tenant}/{second}") == LINES


def test_a_file_goes_through_a_bucket_in_parts(service: Service, s3_url: str) -> None:
    """11 MB on S3, sent in parts of 5 MB: whole, by range, and gone when it is deleted."""
    bucket = open_store(f"{s3_url}&part_size=5242880")
    data = b"".join(b"%010d\n" % number for number in range(1_000_000))
    with contextmanager(clients)(replace(service, store=bucket)) as client_of:
        client = client_of("anna")
        place = f"/v1/files/{upload(client, data)['id']}"
        assert client.get(f"{place}/content").content == data
        assert client.get(f"{place}/content", headers={"range": "bytes=-7"}).content == data[-7:]
        [key] = bucket.list("files")
        assert bucket.info(key).sha256 == hashlib.sha256(data).hexdigest()
        assert client.delete(place).status_code == 200
        assert client.get(f"{place}/content").status_code == 404
    assert list(bucket.list()) == []


def test_the_document_describes_the_form(client_of: ClientOf) -> None:
    document = client_of(None).get("/openapi.json").json()
    form = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["required"]) == {"file", "purpose"}
