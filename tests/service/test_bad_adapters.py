"""Malformed adapters through the front door: each is refused with its reason, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ot_ray.artifacts import BundleManifest, Registry
from ot_ray.model import METHODS
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.controller.acceptance import OffsiteReturns
from tests.http.tiny_service import BASE
from tests.service.bad_adapters import ANNOUNCEMENTS, BAD, FILES
from tests.service.clients import ClientOf
from tests.service.sent_adapters import PLACE, listed, send, tuned_adapter


@pytest.fixture(scope="module")
def sent(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sound")
    for method in METHODS:
        tuned_adapter(bundle_folder, method, place / method)
    return place


def test_every_malformed_adapter_is_rejected_with_its_reason(
    client_of: ClientOf, catalogue: Catalogue, store: LocalStore, settings: ServeConfig, released: BundleManifest,
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    anna, bert = client_of("anna"), client_of("bert")
    catalogue.tenants.change_limits(catalogue.tenants.named("anna").id, {"requests_per_minute": 10_000})
    theirs = send(bert, sent / "full", released.bundle_id)
    catalogue.adapters.move(theirs, {"received"}, "rejected")
    returns = OffsiteReturns(catalogue, store, settings.offsite, canary=lambda model_id: None)
    wrong: list[str] = []
    names = [bad.id for bad in BAD]
    assert len(BAD) > 80 and len(set(names)) > 75
    for number, bad in enumerate(BAD):
        folder = shutil.copytree(sent / bad.method, tmp_path / str(number))
        bad.spoil(folder)
        state, reasons = _verdict(anna, folder, released.bundle_id, returns)
        told = "; ".join(reasons)
        if state != "rejected" or (bad.reason not in told and bad.id != "file empty"):
            wrong.append(f"{bad.method} {bad.id}: {state}: {told[:300]}")
        if re.search(r"/tmp|Traceback|site-packages", told):
            wrong.append(f"{bad.id} tells of this machine: {told[:300]}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "exploded").exists()
    assert Registry(store).served(BASE) == []
    assert list(store.list("plug_ins")) == []
    assert [key for key in store.list("adapters") if theirs not in key] == []
    assert [item["id"] for item in bert.get(PLACE).json()["data"]] == [theirs]
    # And a sound one is still taken.
    adapter_id = send(anna, sent / "full", released.bundle_id)
    returns.step()
    assert anna.get(f"{PLACE}/{adapter_id}").json()["state"] == "accepted"


def _verdict(client: TestClient, folder: Path, bundle_id: str, returns: OffsiteReturns) -> tuple[str, list[str]]:
    """What becomes of a folder that is sent as it is; one that is refused at once counts as rejected."""
    if any(file["bytes"] == 0 for file in listed(folder)):
        answer = client.post(PLACE, json={"bundle_id": bundle_id, "files": listed(folder)})
        assert answer.status_code == 400
        return "rejected", [answer.json()["error"]["message"]]
    adapter_id = send(client, folder, bundle_id)
    returns.step()
    found = client.get(f"{PLACE}/{adapter_id}").json()
    return found["state"], found["reasons"]


def test_malformed_announcements_are_refused_at_once(
    client_of: ClientOf, store: LocalStore, released: BundleManifest
) -> None:
    anna = client_of("anna")
    sound = {"bundle_id": released.bundle_id, "suffix": "support", "files": FILES}
    wrong = []
    for changes, field_ in ANNOUNCEMENTS:
        # Escaped, so that lone surrogates reach the service.
        content = json.dumps({**sound, **changes}).encode()
        answer = anna.post(PLACE, content=content, headers={"content-type": "application/json"})
        error = answer.json().get("error", {})
        # `null` stands for a field's default.
        if answer.status_code not in (400, 413) or field_ not in f"{error.get('param')} {error.get('message')}":
            wrong.append(f"{changes!r}: {answer.status_code} {answer.text[:200]}")
    assert not wrong, "\n".join(wrong)
    for content in (b"", b"[]", b"null", b"{", b"[" * 10_000, b"\xff", b'{"a":' * 10_000 + b"1" + b"}" * 10_000):
        answer = anna.post(PLACE, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, content[:20]
        assert answer.json()["error"]["message"]
    for bundle in ("other", f"{BASE}-9-000000000000", "../x", "\u202e"):
        assert anna.post(PLACE, json={**sound, "bundle_id": bundle}).status_code == 404
    assert anna.get(PLACE).json()["data"] == []
    assert list(store.list("adapters")) == []
