from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ot_ray.artifacts import BundleManifest, Releases, open_bundle
from ot_ray.store import LocalStore
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.routes.pieces import Receiving
from serve.service import Service
from serve.wire.offsite import SMALLEST_PIECE
from tests.http.tiny_service import BASE
from tests.service.clients import ClientOf, new_key
from tests.service.raw_requests import STALL, Answer, Piece
from tests.service.raw_requests import send as send_raw
from tests.service.sent_adapters import PLACE, announce, listed, send, tuned_adapter

BUNDLES = "/v1/offsite/bundles"


@pytest.fixture
def anna(client_of: ClientOf, released: BundleManifest) -> TestClient:
    return client_of("anna")


@pytest.fixture(scope="module")
def adapter(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_adapter(bundle_folder, "full", tmp_path_factory.mktemp("adapter") / "full")


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


# Bundles


def test_the_current_release_is_offered(anna: TestClient, released: BundleManifest, bundle_folder: Path) -> None:
    page = anna.get(BUNDLES).json()
    (offer,) = page["data"]
    assert (page["object"], page["has_more"]) == ("list", False)
    assert (offer["id"], offer["model"], offer["version"]) == (released.bundle_id, BASE, "1")
    assert offer["signing_key_id"] == released.signing_key_id is not None
    assert offer["recommended"] == {"learning_rate": 1e-3}
    assert (offer["gap"], offer["expires_at"]) == (None, None)
    files = {path.name: path for path in bundle_folder.iterdir()}
    assert {file["name"] for file in offer["files"]} == files.keys()
    for file in offer["files"]:
        content = files[file["name"]].read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert offer["bytes"] == sum(path.stat().st_size for path in files.values())
    for name in (released.bundle_id, BASE):
        assert anna.get(f"{BUNDLES}/{name}").json() == offer


def test_nothing_is_offered_before_a_release(client_of: ClientOf) -> None:
    anna = client_of("anna")
    assert anna.get(BUNDLES).json()["data"] == []
    assert "No such bundle" in error_of(anna.get(f"{BUNDLES}/{BASE}"), 404)["message"]


def test_the_gap_is_read_from_the_card(anna: TestClient, store: LocalStore) -> None:
    rows = "| the owner's full model | 12.50 |\n| this bundle, untuned | 31.25 |\n"
    store.write(f"bundles/{BASE}/1/README.md", f"# Card\n\n## Emulator gap\n\n{rows}".encode())
    assert anna.get(f"{BUNDLES}/{BASE}").json()["gap"] == {"full": 12.5, "emulated": 31.25}


def test_every_file_arrives_as_it_was_published(anna: TestClient, bundle_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in anna.get(f"{BUNDLES}/{BASE}").json()["files"]:
        answer = anna.get(f"{BUNDLES}/{BASE}/files/{file['name']}")
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        (copy / file["name"]).write_bytes(answer.content)
    assert open_bundle(copy).manifest == open_bundle(bundle_folder).manifest


def test_ranges(anna: TestClient, bundle_folder: Path) -> None:
    content = (bundle_folder / "adapter.safetensors").read_bytes()
    url, size = f"{BUNDLES}/{BASE}/files/adapter.safetensors", len(content)
    whole = anna.get(url)
    tag = whole.headers["etag"]
    for asked, start, end in (("0-9", 0, 10), (f"{size - 5}-", size - 5, size), ("-7", size - 7, size)):
        answer = anna.get(url, headers={"range": f"bytes={asked}", "if-range": tag})
        assert (answer.status_code, answer.content) == (206, content[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    assert anna.get(url, headers={"range": "bytes=0-9", "if-range": '"other"'}).status_code == 200
    assert anna.get(url, headers={"range": f"bytes={size}-"}).status_code == 416
    assert anna.get(url, headers={"if-none-match": tag}).status_code == 304
    head = anna.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")


@pytest.mark.parametrize(
    "name",
    [
        "../../../secret",
        "..%2f..%2fsecret",
        "%2e%2e/manifest.json",
        "records/1.json",
        "manifest.json%00",
        "",
        "x" * 300,
    ],
)
def test_only_files_of_the_manifest_are_sent(anna: TestClient, store: LocalStore, name: str) -> None:
    store.write("secret", b"the owner's")
    store.write(f"bundles/{BASE}/1/beside.json", b"the owner's")
    for path in (name, "beside.json"):
        assert anna.get(f"{BUNDLES}/{BASE}/files/{path}").status_code == 404


@pytest.mark.parametrize(
    "name", ["other", f"{BASE}-1-000000000000", f"{BASE}-2-000000000000", f"{BASE}-", "..", "ft:x"]
)
def test_unknown_bundles(anna: TestClient, name: str) -> None:
    error_of(anna.get(f"{BUNDLES}/{name}"), 404)


def test_what_was_released_before_stays_there_by_its_id(
    anna: TestClient, store: LocalStore, released: BundleManifest
) -> None:
    for name in ("manifest.json", "README.md", "model.sig"):
        store.write(f"bundles/{BASE}/2/{name}", store.read(f"bundles/{BASE}/1/{name}").replace(b'"1"', b'"2"'))
    Releases(store, BASE).release("2")
    assert anna.get(f"{BUNDLES}/{released.bundle_id}").json()["version"] == "1"
    assert anna.get(f"{BUNDLES}/{BASE}").json()["version"] == "2"


def test_keys_without_the_scope(client_of: ClientOf, released: BundleManifest) -> None:
    assert client_of(None).get(BUNDLES).status_code == 401
    assert client_of("anna", scopes=("jobs",)).get(BUNDLES).status_code == 403
    assert client_of("anna", scopes=("jobs",)).post(PLACE, json={}).status_code == 403


# Adapters


def test_an_adapter_comes_in(anna: TestClient, adapter: Path, released: BundleManifest, store: LocalStore) -> None:
    adapter_id = send(anna, adapter, released.bundle_id)
    found = anna.get(f"{PLACE}/{adapter_id}").json()
    assert (found["object"], found["state"], found["suffix"]) == ("offsite.adapter", "received", "support")
    assert found["bytes"] == sum(path.stat().st_size for path in adapter.iterdir())
    assert anna.get(PLACE).json()["data"] == [found]
    # Completing again changes nothing.
    assert anna.post(f"{PLACE}/{adapter_id}/complete").json() == found
    keys = list(store.list(f"adapters/{adapter_id}"))
    assert keys == [f"adapters/{adapter_id}/adapter/{path.name}" for path in sorted(adapter.iterdir())]
    assert all(store.read(key) == (adapter / key.rpartition("/")[2]).read_bytes() for key in keys)


@pytest.fixture
def large(tmp_path: Path, adapter: Path) -> Path:
    """A folder whose weights take several pieces."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((adapter / "manifest.json").read_bytes())
    (folder / "adapter.safetensors").write_bytes(bytes(range(256)) * 3000)
    return folder


def put(client: TestClient, url: str, content: bytes, start: int, total: int, **headers: str) -> Any:
    given = {"content-range": f"bytes {start}-{start + len(content) - 1}/{total}", **headers}
    return client.put(url, content=content, headers=given)


def test_a_file_in_pieces_goes_on_where_it_was(anna: TestClient, large: Path, released: BundleManifest) -> None:
    adapter_id = announce(anna, large, released.bundle_id).json()["id"]
    url, data = f"{PLACE}/{adapter_id}/files/adapter.safetensors", (large / "adapter.safetensors").read_bytes()
    first, second = SMALLEST_PIECE, SMALLEST_PIECE + 1000
    assert put(anna, url, data[:first], 0, len(data)).status_code == 200
    answer = put(anna, url, data[:second], 0, len(data))
    assert "go on from there" in error_of(answer, 409)["message"]
    assert answer.headers["upload-offset"] == str(first)
    assert put(anna, url, data[second : second + first], second, len(data)).headers["upload-offset"] == str(first)
    head = anna.head(url)
    assert (head.headers["upload-offset"], head.headers["upload-length"]) == (str(first), str(len(data)))
    error = error_of(anna.post(f"{PLACE}/{adapter_id}/complete"), 409)
    assert (error["code"], f"has {first} of {len(data)} bytes" in error["message"]) == ("incomplete", True)
    told = put(anna, url, data[first:], first, len(data)).json()["files"]
    assert {file["name"]: file["received"] for file in told} == {"adapter.safetensors": len(data), "manifest.json": 0}
    anna.put(f"{PLACE}/{adapter_id}/files/manifest.json", content=(large / "manifest.json").read_bytes())
    assert anna.post(f"{PLACE}/{adapter_id}/complete").json()["state"] == "received"


def test_overlapping_pieces_of_racing_clients_count_once(store: LocalStore, tmp_path: Path) -> None:
    data = bytes(range(100))
    files = [{"name": "adapter.safetensors", "bytes": 100, "sha256": hashlib.sha256(data).hexdigest()}]
    receiving = Receiving(store, "adp_1", files)
    for start, end, expected in ((0, 40, 40), (70, 100, 40), (0, 60, 60), (30, 55, 60), (60, 75, 100)):
        (tmp_path / "piece").write_bytes(data[start:end])
        receiving.add("adapter.safetensors", start, tmp_path / "piece")
        assert receiving.received("adapter.safetensors") == expected
    # As another replica, or this one after a restart, sees it.
    again = Receiving(LocalStore(store.root), "adp_1", files)
    assert again.assemble("adapter.safetensors") is None
    assert store.read("adapters/adp_1/adapter/adapter.safetensors") == data
    assert again.assemble("adapter.safetensors") is None
    assert list(store.list("adapters/adp_1")) == ["adapters/adp_1/adapter/adapter.safetensors"]


def test_damage_on_the_way_is_told_and_mended(
    anna: TestClient, adapter: Path, released: BundleManifest, store: LocalStore
) -> None:
    adapter_id = announce(anna, adapter, released.bundle_id).json()["id"]
    for path in adapter.iterdir():
        content = path.read_bytes()
        anna.put(f"{PLACE}/{adapter_id}/files/{path.name}", content=content[:-1] + bytes([content[-1] ^ 1]))
    error = error_of(anna.post(f"{PLACE}/{adapter_id}/complete"), 409)
    assert error["code"] == "wrong_sha256"
    assert all(path.name in error["message"] for path in adapter.iterdir())
    assert list(store.list(f"adapters/{adapter_id}")) == []
    for path in adapter.iterdir():
        assert anna.put(f"{PLACE}/{adapter_id}/files/{path.name}", content=path.read_bytes()).status_code == 200
    assert anna.post(f"{PLACE}/{adapter_id}/complete").json()["state"] == "received"


def test_a_cut_body_keeps_what_came(anna: TestClient, large: Path, released: BundleManifest) -> None:
    adapter_id = announce(anna, large, released.bundle_id).json()["id"]
    data = (large / "adapter.safetensors").read_bytes()
    url = f"{PLACE}/{adapter_id}/files/adapter.safetensors"
    kept = SMALLEST_PIECE + 5
    answer = put(anna, url, data[:kept], 0, len(data), **{"content-range": f"bytes 0-{len(data) - 1}/{len(data)}"})
    # httpx states the length that it sends, which is not the range's.
    assert error_of(answer, 400)["param"] == "content-length"

    def pieces() -> Any:
        yield data[:kept]

    answer = anna.put(url, content=pieces())
    assert f"broke after {kept} of {len(data)} bytes" in error_of(answer, 400)["message"]
    assert anna.head(url).headers["upload-offset"] == str(kept)

    def more() -> Any:
        yield data[kept:]
        yield b"and more"

    answer = anna.put(url, content=more(), headers={"content-range": f"bytes {kept}-{len(data) - 1}/{len(data)}"})
    assert "more than the" in error_of(answer, 400)["message"]
    assert anna.head(url).headers["upload-offset"] == str(kept)


@pytest.mark.parametrize(
    ("content_range", "said"),
    [
        ("bytes 0-9/999", "does not fit"),
        ("bytes 5-1/768000", "must be"),
        ("bytes */768000", "must be"),
        ("items 0-9/768000", "must be"),
        ("bytes 0-999999/768000", "does not fit"),
        ("bytes 0-99999999999999999999/768000", "must be"),
        ("bytes -5-9/768000", "must be"),
        ("bytes 0-9/768000", "at least"),
    ],
)
def test_ranges_that_do_not_fit(
    anna: TestClient, large: Path, released: BundleManifest, content_range: str, said: str
) -> None:
    adapter_id = announce(anna, large, released.bundle_id).json()["id"]
    url = f"{PLACE}/{adapter_id}/files/adapter.safetensors"
    answer = anna.put(url, content=b"0123456789", headers={"content-range": content_range})
    assert said in error_of(answer, 400)["message"]
    assert anna.head(url).headers["upload-offset"] == "0"


def test_unknown_files_and_adapters(anna: TestClient, adapter: Path, released: BundleManifest) -> None:
    adapter_id = announce(anna, adapter, released.bundle_id).json()["id"]
    for name in ("head.safetensors", "..%2fx", "x" * 400, "%00"):
        assert anna.put(f"{PLACE}/{adapter_id}/files/{name}", content=b"x").status_code == 404
    for path in ("", "/complete", "/files/manifest.json"):
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert anna.request(method, f"{PLACE}/adp_{'0' * 24}{path}").status_code in (404, 405)


def test_another_tenant_s_adapter_is_as_unknown_as_none(
    anna: TestClient, client_of: ClientOf, adapter: Path, released: BundleManifest
) -> None:
    bert, adapter_id = client_of("bert"), send(anna, adapter, released.bundle_id)
    unknown = f"adp_{'0' * 24}"
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/complete"),
        ("PUT", "/files/manifest.json"),
        ("HEAD", "/files/manifest.json"),
    ):
        theirs, none = (bert.request(method, f"{PLACE}/{name}{path}") for name in (adapter_id, unknown))
        assert theirs.status_code == none.status_code == 404
        assert theirs.text.replace(adapter_id, unknown) == none.text
    assert bert.get(PLACE).json()["data"] == []
    assert bert.get(PLACE, params={"after": adapter_id}).status_code == 404
    assert anna.get(f"{PLACE}/{adapter_id}").json()["state"] == "received"


def test_deleting(anna: TestClient, adapter: Path, released: BundleManifest, store: LocalStore) -> None:
    begun, whole = announce(anna, adapter, released.bundle_id).json()["id"], send(anna, adapter, released.bundle_id)
    anna.put(f"{PLACE}/{begun}/files/manifest.json", content=(adapter / "manifest.json").read_bytes())
    for adapter_id in (begun, whole):
        assert anna.delete(f"{PLACE}/{adapter_id}").json() == {
            "id": adapter_id,
            "object": "offsite.adapter",
            "deleted": True,
        }
        assert anna.get(f"{PLACE}/{adapter_id}").status_code == 404
    assert list(store.list("adapters")) == []


def test_no_deleting_while_it_is_inspected(
    anna: TestClient, adapter: Path, released: BundleManifest, catalogue: Catalogue
) -> None:
    adapter_id = send(anna, adapter, released.bundle_id)
    catalogue.adapters.move(adapter_id, {"received"}, "inspecting")
    assert error_of(anna.delete(f"{PLACE}/{adapter_id}"), 409)["code"] == "invalid_state"
    answer = anna.put(f"{PLACE}/{adapter_id}/files/manifest.json", content=b"{}")
    assert error_of(answer, 409)["code"] == "invalid_state"


def test_a_tenant_s_uploads_are_few(
    anna: TestClient, client_of: ClientOf, adapter: Path, released: BundleManifest, settings: ServeConfig
) -> None:
    made = [announce(anna, adapter, released.bundle_id) for _ in range(settings.offsite.open_uploads)]
    assert all(answer.status_code == 200 for answer in made)
    answer = announce(anna, adapter, released.bundle_id)
    assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) > 0
    assert announce(client_of("bert"), adapter, released.bundle_id).status_code == 200
    anna.delete(f"{PLACE}/{made[0].json()['id']}")
    assert announce(anna, adapter, released.bundle_id).status_code == 200


def test_the_same_announcement_again_is_the_same_upload(
    anna: TestClient, adapter: Path, released: BundleManifest
) -> None:
    body = {"bundle_id": released.bundle_id, "suffix": "x", "files": listed(adapter)}
    first, again = (anna.post(PLACE, json=body, headers={"idempotency-key": "one"}) for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"
    other = anna.post(PLACE, json={**body, "suffix": "y"}, headers={"idempotency-key": "one"})
    assert error_of(other, 422)["code"] == "idempotency_key_reused"


def test_an_expired_bundle_takes_nothing_back(
    anna: TestClient, adapter: Path, released: BundleManifest, store: LocalStore
) -> None:
    key = f"bundles/{BASE}/1/manifest.json"
    past = released.model_copy(update={"expires": datetime(2020, 1, 1, tzinfo=timezone.utc)})
    store.write(key, past.model_dump_json().encode())
    assert error_of(announce(anna, adapter, released.bundle_id), 400)["code"] == "bundle_expired"


def test_limits_are_known_before_a_byte_is_read(
    base_backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore, released: BundleManifest
) -> None:
    small = settings.offsite.model_copy(
        update={
            "piece_bytes": SMALLEST_PIECE,
            "limits": settings.offsite.limits.model_copy(update={"max_bytes": 10_000_000}),
        }
    )
    service = Service(base_backend, settings.model_copy(update={"offsite": small}), catalogue, store)
    key = new_key(catalogue, "anna")
    with TestClient(create_api(service), headers={"authorization": f"Bearer {key}"}) as anna:
        files = [
            {"name": "manifest.json", "bytes": 100, "sha256": "0" * 64},
            {"name": "adapter.safetensors", "bytes": 10_000_000, "sha256": "0" * 64},
        ]
        body = {"bundle_id": released.bundle_id, "files": files}
        assert "at most 10000000" in error_of(anna.post(PLACE, json=body), 413)["message"]
        files[1]["bytes"] = 9_000_000
        adapter_id = anna.post(PLACE, json=body).json()["id"]
        url = f"{PLACE}/{adapter_id}/files/adapter.safetensors"
        answer = put(anna, url, bytes(SMALLEST_PIECE + 1), 0, 9_000_000)
        assert answer.status_code == 413
        read = []

        def body_of() -> Any:
            for _ in range(40):
                read.append(1)
                yield bytes(65536)

        answer = anna.put(url, content=body_of(), headers={"content-range": f"bytes 0-{2**20 - 1}/9000000"})
        assert error_of(answer, 413)["code"] is None
        assert json.loads(anna.get(f"{PLACE}/{adapter_id}").content)["files"][0]["received"] == 0
    assert list(store.list("adapters")) == []


# Several requests at once


def piece_headers(client: TestClient, start: int, size: int, total: int) -> list[tuple[str, str]]:
    content_range = f"bytes {start}-{start + size - 1}/{total}"
    return [("authorization", client.headers["authorization"]), ("content-range", content_range)]


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_of_two_pieces_at_the_same_place_one_is_kept(
    anna: TestClient, large: Path, released: BundleManifest, service: Service, store: LocalStore
) -> None:
    adapter_id = announce(anna, large, released.bundle_id).json()["id"]
    url, data = f"{PLACE}/{adapter_id}/files/adapter.safetensors", (large / "adapter.safetensors").read_bytes()
    size, app, begun, over = SMALLEST_PIECE, create_api(service), [], []

    def slow() -> Iterator[Piece]:
        yield data[:1000]
        begun.append(True)
        while not over:
            yield 0.01
        yield data[1000 : size + 500]

    async def run() -> tuple[Answer, Answer]:
        headers = piece_headers(anna, 0, size + 500, len(data))
        first = asyncio.create_task(send_raw(app, slow(), headers, "PUT", url))
        await until(lambda: begun)
        second = await send_raw(app, [data[:size]], piece_headers(anna, 0, size, len(data)), "PUT", url)
        over.append(True)
        return await first, second

    first, second = asyncio.run(run())
    assert second.status == 200
    assert (first.status, first.json()["error"]["code"]) == (409, "wrong_offset")
    assert first.headers["upload-offset"] == str(size)
    assert len(list(store.list(f"adapters/{adapter_id}"))) == 1


def test_a_piece_that_ends_after_completion_leaves_nothing(
    anna: TestClient, adapter: Path, released: BundleManifest, service: Service, store: LocalStore
) -> None:
    adapter_id = announce(anna, adapter, released.bundle_id).json()["id"]
    url, data = f"{PLACE}/{adapter_id}/files/manifest.json", (adapter / "manifest.json").read_bytes()
    app, begun, over = create_api(service), [], []

    def slow() -> Iterator[Piece]:
        yield data[:10]
        begun.append(True)
        while not over:
            yield 0.01
        yield data[10:]

    async def run() -> Answer:
        headers = piece_headers(anna, 0, len(data), len(data))
        late = asyncio.create_task(send_raw(app, slow(), headers, "PUT", url))
        await until(lambda: begun)
        for path in adapter.iterdir():
            content, size = path.read_bytes(), path.stat().st_size
            headers = piece_headers(anna, 0, size, size)
            assert (
                await send_raw(app, [content], headers, "PUT", f"{PLACE}/{adapter_id}/files/{path.name}")
            ).status == 200
        assert (await send_raw(app, (), headers, "POST", f"{PLACE}/{adapter_id}/complete")).status == 200
        over.append(True)
        return await late

    assert asyncio.run(run()).status == 409
    keys = list(store.list(f"adapters/{adapter_id}"))
    assert keys == [f"adapters/{adapter_id}/adapter/{path.name}" for path in sorted(adapter.iterdir())]


def test_one_request_completes_and_others_are_to_try_again(
    anna: TestClient, adapter: Path, released: BundleManifest, catalogue: Catalogue
) -> None:
    adapter_id = announce(anna, adapter, released.bundle_id).json()["id"]
    for path in adapter.iterdir():
        anna.put(f"{PLACE}/{adapter_id}/files/{path.name}", content=path.read_bytes())
    assert catalogue.leases.take(f"adapter {adapter_id}", "another", 3600)
    answer = anna.post(f"{PLACE}/{adapter_id}/complete")
    assert error_of(answer, 409)["code"] == "upload_in_use" and int(answer.headers["retry-after"]) > 0
    catalogue.leases.release(f"adapter {adapter_id}", "another")
    assert anna.post(f"{PLACE}/{adapter_id}/complete").json()["state"] == "received"


def test_pieces_of_one_tenant_at_a_time_are_limited(
    anna: TestClient, client_of: ClientOf, large: Path, released: BundleManifest, service: Service, tmp_path: Path
) -> None:
    folder = tmp_path / "incoming"
    files = service.settings.files.model_copy(update={"uploads": 1, "folder": str(folder)})
    app = create_api(replace(service, settings=service.settings.model_copy(update={"files": files})))
    adapter_id = announce(anna, large, released.bundle_id).json()["id"]
    url, data = f"{PLACE}/{adapter_id}/files/adapter.safetensors", (large / "adapter.safetensors").read_bytes()
    headers = piece_headers(anna, 0, SMALLEST_PIECE, len(data))

    async def run() -> None:
        waiting = asyncio.create_task(send_raw(app, [data[:1000], STALL], headers, "PUT", url))
        # It lies where the settings have uploads lie.
        await until(lambda: folder.is_dir() and list(folder.iterdir()))
        refused = await send_raw(app, [data[:SMALLEST_PIECE]], headers, "PUT", url)
        assert refused.status == 429 and int(refused.headers["retry-after"]) > 0
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await send_raw(app, [data[:SMALLEST_PIECE]], headers, "PUT", url)).status == 200

    asyncio.run(run())
    assert list(folder.iterdir()) == []


def test_only_pieces_may_be_as_large_as_pieces(
    anna: TestClient, adapter: Path, released: BundleManifest, settings: ServeConfig
) -> None:
    adapter_id = announce(anna, adapter, released.bundle_id).json()["id"]
    body = bytes(settings.max_body_bytes + 1)
    assert settings.offsite.piece_bytes > len(body)
    for path in (f"/{adapter_id}/complete", f"/{adapter_id}/files/manifest.json"):
        answer = anna.post(PLACE + path, content=body, headers={"idempotency-key": "one"})
        assert "larger than" in error_of(answer, 413)["message"]
