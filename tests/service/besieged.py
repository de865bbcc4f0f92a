"""A running service that is sent what is bad: whoever sends it, who must not notice, and what might stay behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from serve.catalogue import Catalogue
from serve.catalogue.records import File
from tests.http.tiny_service import BASE
from tests.service.bad_requests import Bad
from tests.service.bad_wire import LINE
from tests.service.fuzzing import TRACES
from tests.service.raw_requests import CUT, Answer, Piece
from tests.service.running import Running, administer, until
from tests.service.sent_adapters import listed
from tests.service.sockets import HANG_UP, exchange

TENANTS = ["anna", "ben", "carl", "mallory"]
ROOT = Path(__file__).parents[2]
PARSER = b"Invalid HTTP request received."
"""What uvicorn says of what is no HTTP."""
SCOPES = "files,jobs,inference,offsite"
PLACES = ("files", "fine_tuning/jobs", "webhook_endpoints", "offsite/adapters", "offsite/bundles", "models")
LIMITS = ("requests_per_minute=1000000", "queued_jobs=1000", "running_jobs=0")
"""Jobs are checked, and wait."""


@dataclass(frozen=True)
class Besieged:
    """A service with keys of its tenants; mallory sends what is bad, and ben is who must not notice."""

    running: Running
    catalogue: Catalogue
    incoming: Path
    """Where uploads lie while they come in."""
    keys: dict[str, str]
    port: int
    proxy: psutil.Process
    """The process that listens."""
    ingress: psutil.Process
    """The replica that answers what the proxy is sent."""
    engine: psutil.Process

    def call(self, tenant: str, method: str, path: str, **more: Any) -> requests.Response:
        headers = {"authorization": f"Bearer {self.keys[tenant]}", **more.pop("headers", {})}
        return requests.request(method, f"{self.running.url}/{path}", headers=headers, timeout=300, **more)

    def send(self, bad: Bad) -> Answer | None:
        """Send a request just as it is written; None if the connection ended without an answer."""
        headers = [("host", "tests"), ("authorization", f"Bearer {self.keys['mallory']}"), *bad.headers]
        if bad.content_type is not None:
            headers.append(("content-type", bad.content_type))
        gone = CUT in bad.pieces
        data = b"".join(piece for piece in bad.pieces if isinstance(piece, bytes))
        if not any(name == "content-length" for name, _ in headers):
            headers.append(("content-length", str(len(data) + gone)))
        query = b"?" + bad.query if bad.query else b""
        lines = [bad.method.encode() + b" " + bad.path.encode() + query + b" HTTP/1.1"]
        lines += [_bytes(name) + b": " + _bytes(value) for name, value in headers]
        return self.exchange(b"\r\n".join(lines) + b"\r\n\r\n", data, *([HANG_UP] if gone else []))

    def exchange(self, *pieces: Piece) -> Answer | None:
        return exchange(self.port, *pieces)[0]

    def seen_by_ben(self) -> list[Any]:
        return [self.call("ben", "GET", place).json() for place in PLACES]

    def traces(self) -> dict[str, Any]:
        """All that mallory's uploads could have left, and ben's could have lost."""
        anna, mallory = (self.catalogue.tenants.named(name).id for name in ("anna", "mallory"))
        return {
            "incoming": os.listdir(self.incoming) if self.incoming.exists() else [],
            "files": [key for key in self.stored_files() if f"/{anna}/" not in key],
            "mallory's": [file.id for file in self._files(mallory)],
            "bytes": self.catalogue.files.kept_bytes(mallory),
            "reserved": self.catalogue.files.doomed(),
            "plug-ins": sorted(self.running.store.list("plug_ins")),
            "ben's": self.seen_by_ben(),
        }

    def stored_files(self) -> list[str]:
        return sorted(self.running.store.list("files"))

    def known_files(self) -> list[str]:
        """Where the database says that the store holds files."""
        tenants = self.catalogue.tenants.list()
        return sorted(f"files/{tenant.id}/{file.id}" for tenant in tenants for file in self._files(tenant.id))

    def _files(self, tenant_id: str) -> list[File]:
        page = self.catalogue.files.list(tenant_id, after=None, limit=10_000, order="desc", purpose=None)
        return list(page.items)


def _listening(port: int) -> psutil.Process:
    for process in psutil.process_iter():
        try:
            listening = [item for item in process.net_connections("tcp") if item.status == "LISTEN"]
        except psutil.Error:
            continue
        if any(item.laddr.port == port for item in listening):
            return process
    raise AssertionError("nobody listens")


def _replicas(proxy: psutil.Process, deployment: str) -> list[psutil.Process]:
    parent = proxy.parent()
    assert parent is not None
    return [child for child in parent.children() if f":{deployment}" in "".join(child.cmdline())]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


def log_sizes(logs: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in logs.rglob("*") if path.is_file()}


def tracebacks(logs: Path, before: dict[Path, int], processes: list[psutil.Process]) -> list[str]:
    """Stack traces through this project's code that processes of the service have logged since the sizes were taken."""
    errors = tuple(f"-{process.pid}.err" for process in processes)
    found = []
    for path in logs.rglob("*"):
        if path.is_file() and (path.name.startswith(("replica_", "proxy_")) or path.name.endswith(errors)):
            with path.open("rb") as file:
                file.seek(before.get(path, 0))
                said = file.read().decode(errors="replace").split("Traceback (most recent call last)")
            # Those of Ray alone come when the machine is busy.
            found += [f"{path.name}: {trace[:3000]}" for trace in said[1:] if f'File "{ROOT}/serve' in trace]
    return found


@contextmanager
def besieged(running: Running) -> Iterator[Besieged]:
    """The service with keys for everybody, limits out of the way, and things of ben's that must stay as they are."""
    catalogue = Catalogue.open(running.database)
    keys = {}
    for tenant in TENANTS:
        administer(running.database, "tenant", "limits", tenant, *LIMITS)
        keys[tenant] = running.key(tenant, f"{SCOPES},admin" if tenant == "anna" else SCOPES)
    port = int(running.url.rpartition(":")[2].removesuffix("/v1"))
    proxy = _listening(port)
    [ingress], [engine] = _replicas(proxy, "Api"), _replicas(proxy, "Engine")
    yield Besieged(running, catalogue, running.log.with_name("incoming"), keys, port, proxy, ingress, engine)
    catalogue.close()


def make_bens_things(service: Besieged) -> None:
    """A file, a webhook, and a job that failed because the file holds too little."""
    sent = upload(service, "ben", LINE * 3)
    job = service.call("ben", "POST", "fine_tuning/jobs", json={"model": BASE, "training_file": sent}).json()
    hook = {"url": "https://example.com/", "event_types": ["fine_tuning.job.failed"]}
    assert service.call("ben", "POST", "webhook_endpoints", json=hook).status_code == 200
    until(lambda: service.call("ben", "GET", f"fine_tuning/jobs/{job['id']}").json()["status"] == "failed")


def upload(service: Besieged, tenant: str, data: bytes, name: str = "a.jsonl") -> str:
    answer = service.call(tenant, "POST", "files", data={"purpose": "fine-tune"}, files={"file": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def check_refusal(answer: Answer | None, statuses: tuple[int, ...]) -> None:
    """The answer is one of these, in OpenAI's words unless it was no HTTP, and tells nothing of the inside."""
    if answer is None:
        assert 0 in statuses, "the connection ended without an answer"
        return
    assert answer.status in statuses and answer.status < 500, (answer.status, answer.content[:500])
    assert not [trace for trace in TRACES if trace in answer.content], answer.content
    if answer.status >= 400 and answer.content not in (PARSER, b""):
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def said(response: requests.Response) -> Answer:
    return Answer(response.status_code, dict(response.headers), response.content)


def send_adapter(service: Besieged, folder: Path, bundle: str) -> str:
    asked = {"bundle_id": bundle, "suffix": "support", "files": listed(folder)}
    # As many as may be open at a time wait for their verdicts.
    answer = until(lambda: taken(service.call("mallory", "POST", "offsite/adapters", json=asked)))
    place = f"offsite/adapters/{answer['id']}"
    for path in folder.iterdir():
        put = service.call("mallory", "PUT", f"{place}/files/{path.name}", data=path.read_bytes())
        assert put.status_code == 200, put.text
    assert service.call("mallory", "POST", f"{place}/complete").status_code == 200
    return answer["id"]


def taken(answer: requests.Response) -> dict[str, Any] | None:
    assert answer.status_code in (200, 429), answer.text
    return answer.json() if answer.status_code == 200 else None


def verdict(service: Besieged, adapter_id: str) -> dict[str, Any] | None:
    found = service.call("mallory", "GET", f"offsite/adapters/{adapter_id}").json()
    return found if found["state"] in ("accepted", "rejected") else None


@contextmanager
def watched(service: Besieged) -> Iterator[list[int]]:
    """By how many bytes the memory of the proxy, and of the replica behind it, was larger than at the start at most."""
    processes = [service.proxy, service.ingress]
    before, grown, done = [own_memory(process) for process in processes], [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for i, process in enumerate(processes):
                grown[i] = max(grown[i], own_memory(process) - before[i])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        done.set()
        thread.join()


def own_memory(process: psutil.Process) -> int:
    """Bytes; what Ray's object store shares with all of its workers is not counted."""
    memory = process.memory_info()
    return memory.rss - memory.shared
