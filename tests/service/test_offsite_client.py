"""The customer's client against the real application behind a real HTTP server, with connections that are cut."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn

from ot_ray.artifacts import BundleManifest, Registry, generate_key, key_id, parse_model_id
from ot_ray.client import Client, OfferedBundle, TunedAdapter, service_of, tune
from ot_ray.client.downloads import fetch_file, staging_folder
from ot_ray.client.http import Answer, Http, _wanted_pause
from ot_ray.client.uploads import _send
from ot_ray.config import parse
from ot_ray.errors import (
    AdapterRejectedError,
    AlreadyExistsError,
    ArtifactError,
    ConfigError,
    NotFoundError,
    ServiceError,
    SignatureError,
)
from ot_ray.progress import Progress
from ot_ray.store import LocalStore
from ot_ray.training import TrainingConfig
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.controller.acceptance import OffsiteReturns
from serve.service import Service
from tests.artifacts.hostile import change_tensors
from tests.fixtures.tcp_proxy import TcpProxy
from tests.http.tiny_service import BASE
from tests.service.clients import new_key
from tests.service.sent_adapters import PLACE, TEXT, tuned_adapter

ROOT = Path(__file__).parents[2]
WAIT_S = 90
TRAINING = TrainingConfig(steps=3, batch_size=2, lr=1e-3)


@pytest.fixture
def address(service: Service, released: BundleManifest) -> Iterator[str]:
    """The service behind a real HTTP server, with its controller's part of the work beside it."""
    config = uvicorn.Config(create_api(service), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.fixture
def inspecting(catalogue: Catalogue, store: LocalStore, settings: ServeConfig) -> Iterator[None]:
    """Uploads get their verdicts while the test runs."""
    returns, ended = OffsiteReturns(catalogue, store, settings.offsite, canary=lambda model_id: None), threading.Event()

    def work() -> None:
        while not ended.wait(0.05):
            returns.step()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    ended.set()
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.fixture
def key(catalogue: Catalogue) -> str:
    return new_key(catalogue, "anna")


@pytest.fixture
def client(address: str, key: str, owner_keys: tuple[Path, Path]) -> Client:
    return Client(address, key, public_key=owner_keys[1])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{TEXT} {number}"}) for number in range(12)))
    return path


@pytest.fixture(scope="module")
def adapter(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_adapter(bundle_folder, "full", tmp_path_factory.mktemp("adapter") / "full")


def test_three_lines(client: Client, texts: Path, tmp_path: Path, store: LocalStore, inspecting: None) -> None:
    bundle = client.download(BASE, tmp_path / "bundle")
    adapter = tune(bundle, data=texts, validation=texts, training=TRAINING, sequence_length=64)
    model_id = client.upload(adapter, suffix="support")
    assert (adapter.manifest.method, adapter.manifest.steps) == ("lora", 3)
    assert adapter.manifest.validation_loss is not None
    assert adapter.folder == tmp_path / "bundle-adapter"
    assert parse_model_id(model_id)[:3] == (BASE, "anna", "support")
    registry = Registry(store)
    assert registry.resolve(f"ft:{BASE}:anna:support").model_id == model_id
    # The same again is the same model, at once.
    assert client.upload(adapter.folder, suffix="support") == model_id


def test_what_is_offered(client: Client, released: BundleManifest) -> None:
    (offer,) = client.bundles()
    assert offer == client.offer(BASE) == client.offer(released.bundle_id)
    assert (offer.id, offer.version, offer.signing_key_id) == (released.bundle_id, "1", released.signing_key_id)
    with pytest.raises(ServiceError, match="was answered 404: No such bundle: other"):
        client.download("other", "nowhere")


def test_a_bundle_arrives_whole(client: Client, bundle_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    assert client.download(BASE, target).folder == target
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in bundle_folder.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir() if "download" in path.name] == []
    with pytest.raises(AlreadyExistsError, match="already there"):
        client.download(BASE, target)


def test_a_cut_download_goes_on(client: Client, bundle_folder: Path, tmp_path: Path, service: Service) -> None:
    large = max(bundle_folder.iterdir(), key=lambda path: path.stat().st_size)
    half = large.stat().st_size // 2
    assert service.store is not None
    # What an earlier run had got of the largest file; a store that would send its first half differently now.
    staging = staging_folder(tmp_path / "bundle", client.offer(BASE).id)
    staging.mkdir()
    (staging / large.name).write_bytes(large.read_bytes()[:half])
    key = f"bundles/{BASE}/1/{large.name}"
    service.store.write(key, bytes(half) + large.read_bytes()[half:])
    bundle = client.download(BASE, tmp_path / "bundle")
    assert (bundle.folder / large.name).read_bytes() == large.read_bytes()
    assert not staging.exists()


@pytest.mark.parametrize("pieces", [[0.3, 0.3, 1.0], [0.0, 0.5, 0.0, 1.0]])
def test_connections_that_break_cost_only_what_they_did_not_bring(
    bundle_folder: Path, tmp_path: Path, pieces: list[float]
) -> None:
    data, asked = (bundle_folder / "adapter.safetensors").read_bytes(), []
    sha256, shares = hashlib.sha256(data).hexdigest(), list(pieces)

    class Cutting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            asked.append((start, self.headers.get("if-range")))
            self.send_response(206 if start else 200)
            self.send_header("content-length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + int((len(data) - start) * shares.pop(0))])

        def log_message(self, *args: object) -> None:
            pass

    with serving(Cutting) as url, Progress("test", 1) as bar:
        fetch_file(Http(url, "sk-x", patience_s=WAIT_S), "/file", tmp_path / "file", len(data), sha256, bar, 0)
    assert (tmp_path / "file").read_bytes() == data
    assert len(asked) == len(pieces)
    assert all(tag == f'"{sha256}"' for start, tag in asked if start)
    assert [start for start, _ in asked] == sorted(start for start, _ in asked)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A small HTTP server of this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(WAIT_S)
        server.server_close()


def test_redirects_are_not_followed_with_a_key() -> None:
    seen: list[str] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(302)
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with serving(Redirecting) as url, pytest.raises(ServiceError, match="redirect"):
        Client(url, "sk-x").bundles()
    assert seen == ["/v1/offsite/bundles"]


def test_a_service_that_goes_away_and_comes_back(
    address: str, key: str, adapter: Path, tmp_path: Path, inspecting: None
) -> None:
    proxy = TcpProxy(int(address.rpartition(":")[2]))
    try:
        client = Client(f"http://127.0.0.1:{proxy.port}", key, patience_s=WAIT_S)
        proxy.cut_after = 20_000
        back = threading.Thread(target=lambda: (proxy.is_cut.wait(WAIT_S), proxy.restore()))
        back.start()
        assert client.upload(adapter, suffix="again").startswith(f"ft:{BASE}:anna:again:")
        assert proxy.passed > 20_000
        back.join(WAIT_S)
    finally:
        proxy.close()


def test_a_service_that_is_away_is_told(key: str) -> None:
    with pytest.raises(ServiceError, match="does not answer"):
        Client("http://127.0.0.1:9", key, patience_s=0).bundles()


def test_bundles_of_others_are_refused(address: str, key: str, store: LocalStore, tmp_path: Path) -> None:
    _, stranger = generate_key(tmp_path / "keys")
    with pytest.raises(SignatureError, match=f"is key {key_id(stranger)}"):
        Client(address, key, public_key=stranger).download(BASE, tmp_path / "bundle")
    manifest = json.loads(store.read(f"bundles/{BASE}/1/manifest.json"))
    store.write(f"bundles/{BASE}/1/manifest.json", json.dumps({**manifest, "signing_key_id": None}).encode())
    with pytest.raises(SignatureError, match="not signed"):
        Client(address, key, public_key=stranger).download(BASE, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_wrong_key_costs_nothing_that_was_downloaded(
    client: Client, address: str, key: str, bundle_folder: Path, tmp_path: Path
) -> None:
    _, stranger = generate_key(tmp_path / "keys")
    staging = staging_folder(tmp_path / "bundle", client.offer(BASE).id)
    shutil.copytree(bundle_folder, staging)
    before = {path.name: path.read_bytes() for path in staging.iterdir()}
    with pytest.raises(SignatureError, match=f"is key {key_id(stranger)}"):
        Client(address, key, public_key=stranger).download(BASE, tmp_path / "bundle")
    assert {path.name: path.read_bytes() for path in staging.iterdir()} == before
    assert client.download(BASE, tmp_path / "bundle").manifest.model == BASE


@pytest.mark.parametrize("name", ["adapter.safetensors", "config.json"])
def test_bytes_that_are_not_the_owner_s_are_refused(
    client: Client, store: LocalStore, tmp_path: Path, name: str
) -> None:
    key = f"bundles/{BASE}/1/{name}"
    data = store.read(key)
    store.write(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{name} came with sha256"):
        client.download(BASE, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    store.write(key, data)
    assert client.download(BASE, tmp_path / "bundle").manifest.model == BASE


def test_a_manifest_that_was_changed_is_refused_by_its_signature(
    client: Client, store: LocalStore, tmp_path: Path
) -> None:
    key = f"bundles/{BASE}/1/manifest.json"
    store.write(key, store.read(key).replace(b'"learning_rate": 0.001', b'"learning_rate": 0.101'))
    with pytest.raises(SignatureError, match="does not belong to these files"):
        client.download(BASE, tmp_path / "bundle")
    assert list(tmp_path.glob(".bundle-*")) == []


def test_a_rejected_adapter_comes_back_with_every_reason(
    client: Client, adapter: Path, tmp_path: Path, inspecting: None
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "bad")
    change_tensors(folder, lambda tensors: tensors.update({n: t * 100 for n, t in tensors.items()}))
    for _ in range(2):
        with pytest.raises(AdapterRejectedError) as caught:
            client.upload(folder)
        assert len(caught.value.reasons) > 3
        assert all(reason in str(caught.value) for reason in caught.value.reasons)
    assert pickle.loads(pickle.dumps(caught.value)).reasons == caught.value.reasons


def test_an_upload_that_was_broken_off_is_the_same_upload(
    client: Client, address: str, key: str, adapter: Path, catalogue: Catalogue
) -> None:
    for _ in range(2):
        with pytest.raises(ServiceError, match="is still received after"):
            client.upload(adapter, wait_s=0)
    tenant = catalogue.tenants.named("anna")
    (upload,) = catalogue.adapters.list(tenant.id).items
    # One that was deleted meanwhile is begun anew.
    assert Http(address, key).json("DELETE", f"{PLACE}/{upload.id}")["deleted"]
    with pytest.raises(ServiceError, match="is still received after"):
        client.upload(adapter, wait_s=0)
    (again,) = catalogue.adapters.list(tenant.id).items
    assert again.id != upload.id


def test_a_service_that_refuses_what_it_asks_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_HEAD()

        def do_HEAD(self) -> None:
            asked.append(self.command)
            self.send_response(200 if self.command == "HEAD" else 409)
            self.send_header("upload-offset", "3")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    path = tmp_path / "adapter.safetensors"
    path.write_bytes(bytes(10))
    monkeypatch.setattr("ot_ray.client.uploads._LONGEST_PAUSE_S", 0.01)
    with serving(Refusing) as url, Progress("test", 1) as bar, pytest.raises(ServiceError, match="answered 409"):
        _send(Http(url, "sk-x"), {"id": "adp_1", "piece_bytes": 100}, path, 10, bar, 0)
    assert 1 < asked.count("PUT") < 20


def test_an_adapter_whose_model_was_deleted_is_sent_anew(
    client: Client, adapter: Path, catalogue: Catalogue, store: LocalStore, inspecting: None
) -> None:
    model_id = client.upload(adapter, suffix="back")
    Registry(store).withdraw(model_id)
    assert client.upload(adapter, suffix="back") == model_id
    assert [record.model_id for record in Registry(store).served(BASE, "anna")] == [model_id]
    assert len(catalogue.adapters.list(catalogue.tenants.named("anna").id).items) == 2


def test_folders_that_hold_no_adapter(client: Client, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"manifest.json is missing"):
        client.upload(tmp_path)
    folder = shutil.copytree(adapter, tmp_path / "cut")
    (folder / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="no whole adapter"):
        client.upload(folder)
    with pytest.raises(ConfigError, match="suffix is 'a/b'"):
        client.upload(adapter, suffix="a/b")


def test_keys_are_never_shown(address: str, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OT_RAY_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set OT_RAY_API_KEY"):
        Client(address)
    monkeypatch.setenv("OT_RAY_API_KEY", key)
    assert Client(address).bundles()
    secret = "sk-secret\nx"
    for make in (lambda: Client(address, secret), lambda: Http(address, "sk-secret x")):
        with pytest.raises(ConfigError) as caught:
            make()
        assert "secret" not in str(caught.value)
    assert key not in repr(Client(address)) + repr(Http(address, key))
    wrong = "sk-ot-0000000000000000"
    with pytest.raises(ServiceError) as refused:
        Client(address, wrong).bundles()
    assert "401" in str(refused.value) and wrong not in str(refused.value)
    with pytest.raises(ConfigError, match="is no file"):
        Client(address, key, public_key=tmp_path / "nothing.pem")


@pytest.mark.parametrize("url", ["", "host", "ftp://host", "https://", "https://user:x@host", "https://host?x=1"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="is no service"):
        Client(url, "sk-x")


@pytest.mark.parametrize(
    ("status", "headers", "least", "most"),
    [
        (200, {}, None, None),
        (429, {"retry-after": "7"}, 7, 7),
        (503, {"retry-after": "2"}, 2, 2),
        (409, {"retry-after": "3"}, 3, 3),
        (503, {}, 0.5, 1.5),
        (400, {}, None, None),
        (409, {}, None, None),
        (409, {"x-should-retry": "true"}, 0.5, 1.5),
        (503, {"x-should-retry": "false", "retry-after": "2"}, None, None),
        (429, {"retry-after": "soon"}, 0.5, 1.5),
    ],
)
def test_retries_wait_as_long_as_they_are_told(
    status: int, headers: dict[str, str], least: float | None, most: float | None
) -> None:
    found = _wanted_pause(Answer(status, headers, b""), 1.0)
    if least is None or most is None:
        assert found is None
    else:
        assert found is not None and least <= found <= most


def test_tuning_refuses_what_the_owner_does_not_take_back(bundle_folder: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method is 'magic'"):
        tune(bundle_folder, data=texts, method="magic")  # type: ignore[arg-type]
    found = tune(
        bundle_folder, data=texts, method="bitfit", training=TRAINING, sequence_length=64, output=tmp_path / "out"
    )
    assert isinstance(found, TunedAdapter)
    assert (found.folder, found.manifest.method) == (tmp_path / "out", "bitfit")


def test_addresses_of_bundles() -> None:
    url = "https://host:1/base/v1/offsite/bundles/tiny-1-abc"
    assert service_of(url) == ("https://host:1/base", "tiny-1-abc")
    assert service_of("http://h/v1/offsite/bundles/a%20b/") == ("http://h", "a b")
    for wrong in ("https://host", "https://host/v1/offsite/bundles/", "s3://b/v1/offsite/bundles/x", f"{url}?x=1"):
        with pytest.raises(ConfigError, match="use https://host/v1/offsite/bundles"):
            service_of(wrong)
    with pytest.raises(ConfigError, match="leave out folder"):
        parse(OfferedBundle, {"url": url, "folder": "x"}, "bundle")
    with pytest.raises(ConfigError, match="name a folder, or a store"):
        parse(OfferedBundle, {}, "bundle")


def test_the_same_at_the_shell(
    address: str, key: str, texts: Path, tmp_path: Path, owner_keys: tuple[Path, Path], inspecting: None,
    store: LocalStore,
) -> None:  # fmt: skip
    words = [
        "--bundle", f"{address}/v1/offsite/bundles/{BASE}", f"bundle.public_key={owner_keys[1]}",
        f"data.source={texts}", "training={steps: 2, batch_size: 2, lr: 0.001}", "sequence_length=64", "method=lora",
        f"output={tmp_path / 'adapter'}", "upload.suffix=shell",
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.tune", *words],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env={**os.environ, "OT_RAY_API_KEY": key},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    model_id = json.loads(ended.stdout)["model_id"]
    assert Registry(store).resolve(f"ft:{BASE}:anna:shell").model_id == model_id
    assert key not in ended.stdout + ended.stderr
    assert (tmp_path / "adapter" / "manifest.json").is_file()
