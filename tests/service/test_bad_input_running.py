"""Bad input against the running service, through Ray's proxy: no 5xx, no trace, nothing left behind, nobody disturbed.

The same requests with the reason each is given: test_bad_uploads.py and test_bad_adapters.py, without Ray."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import requests

from ot_ray.launch.cluster import ClusterAddress
from serve.connections import PATIENCE_S
from tests.http.tiny_service import BASE
from tests.service.bad_adapters import ANNOUNCEMENTS, BAD, FILES
from tests.service.bad_requests import CASES, GOOD, MOST
from tests.service.bad_wire import (
    BODIES,
    CONTENT_TYPES,
    ENDPOINTS,
    JSONL,
    KEY,
    LIES,
    LINE,
    SUFFIXES,
    TARGETS,
    hand_made,
)
from tests.service.besieged import (
    TENANTS,
    Besieged,
    besieged,
    check_refusal,
    log_sizes,
    make_bens_things,
    said,
    send_adapter,
    tracebacks,
    upload,
    verdict,
    watched,
)
from tests.service.fuzzing import TAGS, Fuzzer
from tests.service.raw_requests import Answer
from tests.service.running import running_service, until
from tests.service.sent_adapters import listed, tuned_adapter
from tests.service.sockets import only_sent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = {"patience": {"idle_s": 5.0, "grace_s": 8.0}}


@pytest.fixture(scope="module")
def service(
    local_ray: ClusterAddress,
    checkpoint: Path,
    bundle_folder: Path,
    owner_keys: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Besieged]:
    folder = tmp_path_factory.mktemp("besieged")
    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"  # type: ignore[attr-defined]
    before = log_sizes(logs)
    settings = {**SETTINGS, "files": {"max_bytes": MOST, "folder": str(folder / "incoming")}}
    bundle, public = bundle_folder, owner_keys[1]
    with running_service(folder, local_ray.ray, checkpoint, bundle, public, TENANTS, **settings) as running:
        with besieged(running) as found:
            make_bens_things(found)
            processes = [found.proxy, found.ingress, found.engine]
            yield found
        assert "Traceback" not in running.log.read_text()
        assert not tracebacks(logs, before, processes)


@pytest.fixture(scope="module")
def sleepers(service: Besieged) -> Iterator[list[socket.socket]]:
    """Connections whose heads come letter by letter, all the while."""
    connections = [socket.create_connection(("127.0.0.1", service.port), 60) for _ in range(30)]
    done = threading.Event()

    def trickle() -> None:
        for letter in b"GET /v1/models HTTP/1.1\r\nx-a: " + b"a" * 1000:
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.sendall(bytes([letter]))
            if done.wait(0.2):
                return

    thread = threading.Thread(target=trickle)
    thread.start()
    yield connections
    done.set()
    thread.join()
    for connection in connections:
        connection.close()


def test_there_are_hundreds_of_them() -> None:
    assert hand_made() + len(CASES) + len(BAD) + len(ANNOUNCEMENTS) > 500


@pytest.fixture(scope="module")
def untouched(service: Besieged) -> Iterator[None]:
    """Whatever a module's tests send, as little is there in the end as before."""
    before = service.traces()
    assert before["mallory's"] == [] and len(before["files"]) == 1
    yield
    until(lambda: not service.traces()["incoming"])
    assert service.traces() == before


# What a connection's other end answers where the same request in this process has a status of its own.
OTHERWISE = {
    "gone at once": (0,),
    "gone in the middle": (0,),
    "a length that is too large": (408,),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_uploads(service: Besieged, untouched: None, sleepers: list[socket.socket], name: str) -> None:
    bad = CASES[name]
    check_refusal(service.send(bad), OTHERWISE.get(name, (bad.status, 400)))


@pytest.mark.parametrize("name", LIES)
def test_requests_that_lie(service: Besieged, untouched: None, sleepers: list[socket.socket], name: str) -> None:
    key = b"authorization: Bearer " + service.keys["mallory"].encode() + b"\r\n"
    pieces = [piece.replace(KEY, key) if isinstance(piece, bytes) else piece for piece in LIES[name].pieces]
    check_refusal(service.exchange(*pieces), LIES[name].statuses)


def test_requests_for_what_lies_elsewhere(service: Besieged, untouched: None) -> None:
    key = b"authorization: Bearer " + service.keys["mallory"].encode() + b"\r\n"
    for target in TARGETS:
        head = f"{target} HTTP/1.1\r\nhost: a\r\n".encode() + key
        check_refusal(service.exchange(head + b"content-length: 0\r\n\r\n"), (400, 404, 405, 411))


@pytest.mark.parametrize("place", ENDPOINTS)
def test_bodies_that_are_no_requests(service: Besieged, untouched: None, place: str) -> None:
    headers = {"content-type": "application/json"}
    for body in BODIES.values():
        check_refusal(said(service.call("mallory", "POST", place, data=body, headers=headers)), (400, 404))


@pytest.mark.parametrize("kind", CONTENT_TYPES)
def test_bodies_of_another_kind(service: Besieged, untouched: None, kind: str) -> None:
    body = json.dumps({"model": BASE, "prompt": "a"})
    answer = said(service.call("mallory", "POST", "completions", data=body, headers={"content-type": kind}))
    check_refusal(answer, (200, 400) if "json" in kind else (400, 415))


def test_names_that_look_like_others(service: Besieged, untouched: None) -> None:
    bundle = service.call("ben", "GET", "offsite/bundles").json()["data"][0]["id"]
    for suffix in SUFFIXES:
        for place, fields in (
            ("fine_tuning/jobs", {"model": BASE, "training_file": "file-0"}),
            ("offsite/adapters", {"bundle_id": bundle, "files": FILES}),
        ):
            # Escaped, so that lone surrogates reach the service.
            body = json.dumps({**fields, "suffix": suffix})
            headers = {"content-type": "application/json"}
            answer = said(service.call("mallory", "POST", place, data=body, headers=headers))
            check_refusal(answer, (400,))
            assert answer.json()["error"]["param"] == "suffix", (suffix, place, answer.content)


def test_malformed_announcements(service: Besieged, untouched: None) -> None:
    bundle = service.call("ben", "GET", "offsite/bundles").json()["data"][0]["id"]
    for changes, _ in ANNOUNCEMENTS:
        body = json.dumps({"bundle_id": bundle, "suffix": "support", "files": FILES, **changes})
        headers = {"content-type": "application/json"}
        answer = service.call("mallory", "POST", "offsite/adapters", data=body, headers=headers)
        check_refusal(said(answer), (400, 404, 413))
    assert service.call("mallory", "GET", "offsite/adapters").json()["data"] == []


def test_slow_bodies_are_cut_off(service: Besieged, untouched: None) -> None:
    places = [
        ("/v1/files", "multipart/form-data; boundary=B", GOOD),
        ("/v1/completions", "application/json", b"{" * 99),
    ]

    def stall(path: str, kind: str, body: bytes, trickles: bool) -> Answer | None:
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        key = f"authorization: Bearer {service.keys['mallory']}\r\n\r\n"
        pieces = [item for byte in body[:40] for item in (bytes([byte]), 0.5)] if trickles else [body[:40]]
        return service.exchange((head + key).encode(), *pieces)

    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(stall, *place, trickles) for place in places for trickles in (True, False)]
        for answer in answers:
            check_refusal(answer.result(), (408,))


def test_malformed_training_files_are_told_with_their_line(service: Besieged) -> None:
    jobs = {}
    for name, line in JSONL.items():
        asked = {"model": BASE, "training_file": upload(service, "mallory", LINE * 12 + line, f"../{name}\u202e.jsonl")}
        answer = service.call("mallory", "POST", "fine_tuning/jobs", json=asked)
        assert answer.status_code == 200, (name, answer.text)
        jobs[name] = answer.json()["id"]

    def judged(job_id: str) -> dict[str, Any] | None:
        job = service.call("mallory", "GET", f"fine_tuning/jobs/{job_id}").json()
        return None if job["status"] == "validating_files" else job

    for name, job_id in jobs.items():
        job = until(lambda job_id=job_id: judged(job_id))
        assert job["error"], (name, job)
        assert (job["status"], job["error"]["code"]) == ("failed", "invalid_training_file"), (name, job)
        assert "Line 13" in job["error"]["message"] and len(job["error"]["message"]) < 5000, (name, job["error"])
    for file in service.call("mallory", "GET", "files").json()["data"]:
        assert service.call("mallory", "DELETE", f"files/{file['id']}").status_code == 200
    tenant = service.catalogue.tenants.named("mallory").id
    until(lambda: not [key for key in service.stored_files() if f"/{tenant}/" in key])


def test_malformed_adapters_are_rejected_and_deleted(
    service: Besieged, untouched: None, bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = service.call("ben", "GET", "offsite/bundles").json()["data"][0]["id"]
    sound = {method: tuned_adapter(bundle_folder, method, tmp_path / method) for method in {bad.method for bad in BAD}}
    sent: dict[str, str] = {}
    for number, bad in enumerate(BAD[::SHARE]):
        folder = shutil.copytree(sound[bad.method], tmp_path / str(number))
        bad.spoil(folder)
        if all(file["bytes"] for file in listed(folder)):
            sent[bad.id] = send_adapter(service, folder, bundle)
        shutil.rmtree(folder)
    assert len(sent) > 10
    for name, adapter_id in sent.items():
        found = until(lambda adapter_id=adapter_id: verdict(service, adapter_id))
        assert found["state"] == "rejected" and found["reasons"], (name, found)
        assert "Traceback" not in str(found["reasons"]) and "/tmp" not in str(found["reasons"]), (name, found)
    until(lambda: not list(service.running.store.list("adapters")))


SHARE = 6
"""One in so many of the adapters goes through inspection here, where each takes a process of its own."""
BLOCK, BLOCKS = b"x" * 65536, 4800
"""300 MB in all."""
ROOM = 64 * 2**20
"""Bytes by which a process may grow meanwhile."""


@pytest.mark.parametrize("target", ["POST /v1/completions", "POST /v1/files", "GET /v1/models", "POST /nowhere"])
@pytest.mark.parametrize("key", ["mallory", "none"])
def test_large_bodies_do_not_fill_the_proxy(service: Besieged, untouched: None, target: str, key: str) -> None:
    bearer = service.keys.get(key, "sk-ot-none")
    head = f"{target} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {bearer}\r\ntransfer-encoding: chunked\r\n\r\n"
    with watched(service) as grown:
        service.exchange(head.encode(), *[b"10000\r\n" + BLOCK + b"\r\n"] * BLOCKS)
    assert max(grown) < ROOM, grown


def sent_until_stuck(connection: socket.socket) -> int:
    sent = 0
    with contextlib.suppress(TimeoutError):
        for _ in range(BLOCKS):
            connection.sendall(b"10000\r\n" + BLOCK + b"\r\n")
            sent += len(BLOCK)
    return sent


def test_a_replica_that_takes_nothing_does_not_fill_the_proxy(service: Besieged, untouched: None) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    replica = service.ingress
    with watched(service) as grown, only_sent(service.port, head) as connection:
        replica.send_signal(signal.SIGSTOP)
        try:
            connection.settimeout(2.0)
            sent = sent_until_stuck(connection)
        finally:
            replica.send_signal(signal.SIGCONT)
    assert sent < ROOM and max(grown) < ROOM, (sent, grown)
    assert service.call("ben", "GET", "models").status_code == 200


@pytest.fixture(scope="module")
def fuzzer(service: Besieged) -> Iterator[Fuzzer]:
    known = {"model": BASE, "model_id": BASE, "name": "config.json"}
    known["bundle_id"] = known["bundle"] = service.call("anna", "GET", "offsite/bundles").json()["data"][0]["id"]
    known["file_id"] = known["training_file"] = upload(service, "anna", LINE * 12)
    asked = {"model": BASE, "training_file": known["file_id"]}
    known["job_id"] = service.call("anna", "POST", "fine_tuning/jobs", json=asked).json()["id"]
    hook = {"url": "https://example.com/", "event_types": ["fine_tuning.job.failed"]}
    known["webhook_id"] = service.call("anna", "POST", "webhook_endpoints", json=hook).json()["id"]
    # Neither the key that asks nor its tenant.
    known["tenant_id"] = service.catalogue.tenants.named("carl").id
    known["key_id"] = service.catalogue.keys.create(known["tenant_id"], ("files",))[0].id
    with requests.Session() as session:
        yield Fuzzer(service.running.url.removesuffix("/v1"), service.keys["anna"], known, session)


def test_no_request_of_thousands_breaks_the_service(service: Besieged, fuzzer: Fuzzer) -> None:
    before = service.seen_by_ben()
    for tag in TAGS:
        fuzzer.ask(tag)
        assert service.seen_by_ben() == before, tag
        assert service.stored_files() == service.known_files(), tag
    refused = sum(count for status, count in fuzzer.answered.items() if status // 100 == 4)
    assert fuzzer.answered.total() > 2000 and refused > 1000 and fuzzer.answered[200] > 200, fuzzer.answered


def test_heads_that_come_letter_by_letter_are_cut_off(sleepers: list[socket.socket], service: Besieged) -> None:
    for connection in sleepers:
        connection.settimeout(300 + PATIENCE_S)
        said = b""
        # A letter that crossed the answer resets the connection.
        with contextlib.suppress(ConnectionError):
            said = connection.recv(4096)
        assert said == b"" or said.startswith(b"HTTP/1.1 408 ")
    assert service.call("ben", "GET", "models").status_code == 200
