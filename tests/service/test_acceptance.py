from __future__ import annotations

import asyncio
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file

from ot_ray.artifacts import BundleManifest, Registry, parse_model_id
from ot_ray.errors import AdapterRejectedError, NotFoundError, StoreError, StoreUnavailableError
from ot_ray.model import METHODS, Method, adapter_state, plug_in
from ot_ray.store import LocalStore, upload_folder
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.controller.acceptance import AcceptanceWork, OffsiteReturns, Outcome, accept, judged
from serve.engine.backend import Backend
from serve.engine.canary import CanaryReport
from serve.failures import BusyError
from tests.artifacts.hostile import change_tensors
from tests.http.tiny_service import BASE, PLAN
from tests.service.clients import ClientOf
from tests.service.sent_adapters import PLACE, announce, send, tuned_adapter


@pytest.fixture(scope="module")
def sent(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of each method, which tests copy."""
    place = tmp_path_factory.mktemp("sent")
    for method in METHODS:
        tuned_adapter(bundle_folder, method, place / method)
    return place


def work(store: LocalStore, released: BundleManifest, prefix: str = "somewhere/x", **changes: str) -> AcceptanceWork:
    values: dict[str, Any] = {
        "model": BASE,
        "version": "1",
        "bundle_id": released.bundle_id,
        "tenant": "anna",
        "suffix": "support",
    }
    return AcceptanceWork(store=store.url, prefix=prefix, **{**values, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_a_sound_adapter_becomes_a_plug_in_that_is_not_promoted(
    store: LocalStore, released: BundleManifest, sent: Path, method: Method, base: torch.nn.Module
) -> None:
    upload_folder(store, sent / method, "somewhere/x")
    todo = work(store, released)
    outcome = accept(pickle.loads(pickle.dumps(todo)))
    assert (outcome.accepted, outcome.reasons) == (True, [])
    assert outcome.report["change_norm"] > 0
    assert outcome.model_id is not None
    assert parse_model_id(outcome.model_id)[:3] == (BASE, "anna", "support")
    registry = Registry(store)
    assert registry.served(BASE) == []
    # What is in the registry is what was tuned: the plug-in of the full model holds it.
    state = registry.load_state(outcome.model_id)
    plugged = adapter_state(plug_in(base, PLAN, state), PLAN)  # type: ignore[arg-type]
    assert all(torch.equal(plugged[name], state[name]) for name in state)
    if method == "full":
        file = load_file(sent / "full" / "adapter.safetensors")
        assert sorted(float(t.sum()) for t in file.values()) == sorted(float(t.sum()) for t in state.values())
    assert accept(todo) == pickle.loads(pickle.dumps(outcome))


def test_reasons_of_every_check(store: LocalStore, released: BundleManifest, sent: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sent / "full", tmp_path / "full")
    change_tensors(folder, lambda tensors: tensors.update({n: t * 100 for n, t in tensors.items()}))
    upload_folder(store, folder, "far")
    found = accept(work(store, released, "far"))
    assert (found.accepted, found.model_id) == (False, None)
    assert len(found.reasons) > 5
    assert all("moved by" in reason for reason in found.reasons[:5])
    store.write("far/x.pkl", b"x")
    assert accept(work(store, released, "far")).reasons == ["'x.pkl' is no file of an adapter; leave it out"]
    assert accept(work(store, released, "nothing")).reasons == ["there are no files"]
    small = work(store, released, "near")
    upload_folder(store, sent / "full", "near")
    small = replace(small, limits=small.limits.model_copy(update={"max_bytes": 1000}))
    assert "at most 1000 are taken" in accept(small).reasons[0]
    assert list(store.list("plug_ins")) == []


def test_a_store_that_fails_says_nothing_of_the_adapter(
    store: LocalStore, released: BundleManifest, sent: Path
) -> None:
    upload_folder(store, sent / "full", "somewhere/x")
    with pytest.raises(StoreError, match="not other-1"):
        accept(work(store, released, bundle_id="other-1"))
    with pytest.raises(NotFoundError, match="published versions: 1"):
        accept(work(store, released, version="2"))
    store.write(f"bundles/{BASE}/1/adapter.safetensors", b"damaged")
    with pytest.raises(StoreError, match="sha256"):
        accept(work(store, released))


@pytest.fixture
def anna(client_of: ClientOf, released: BundleManifest) -> TestClient:
    return client_of("anna")


def asked(backend: Backend) -> Callable[[str], CanaryReport]:
    """A real canary run on the engine in this process."""
    return lambda model_id: asyncio.run(backend.canary(model_id))


@pytest.fixture
def returns(catalogue: Catalogue, store: LocalStore, settings: ServeConfig, backend: Backend) -> OffsiteReturns:
    canary = judged(asked(backend), settings.offsite.max_perplexity_ratio)
    return OffsiteReturns(catalogue, store, settings.offsite, canary=canary)


def test_an_upload_becomes_a_model_that_is_served(
    anna: TestClient, returns: OffsiteReturns, sent: Path, released: BundleManifest, store: LocalStore, backend: Backend
) -> None:
    adapter_id = send(anna, sent / "lora", released.bundle_id)
    assert returns.step() == 1
    found = anna.get(f"{PLACE}/{adapter_id}").json()
    assert (found["state"], found["reasons"]) == ("accepted", [])
    assert found["finished_at"] >= found["created_at"]
    assert found["report"]["canary_perplexity"] > 0
    registry = Registry(store)
    (record,) = registry.served(BASE, "anna")
    assert found["model_id"] == record.model_id
    assert registry.resolve(f"ft:{BASE}:anna:support") == record
    assert list(store.list("adapters")) == []
    assert returns.step() == 0
    # The engine knows the model now.
    assert record.model_id in [card.id for card in asyncio.run(_models(backend))]
    assert anna.delete(f"{PLACE}/{adapter_id}").status_code == 409


async def _models(backend: Backend) -> list[Any]:
    return list(await backend.models("anna"))


def test_a_later_adapter_of_the_suffix_is_current_and_the_earlier_stays(
    anna: TestClient, returns: OffsiteReturns, sent: Path, released: BundleManifest, store: LocalStore
) -> None:
    ids = []
    for method in ("full", "bitfit"):
        adapter_id = send(anna, sent / method, released.bundle_id)
        returns.step()
        ids.append(anna.get(f"{PLACE}/{adapter_id}").json()["model_id"])
    registry = Registry(store)
    assert [record.model_id for record in registry.served(BASE, "anna")] == sorted(ids)
    assert registry.resolve(f"ft:{BASE}:anna:support").model_id == ids[1]
    assert registry.rollback(BASE, "anna", "support").model_id == ids[0]


def test_the_canary_has_the_last_word(
    anna: TestClient, catalogue: Catalogue, store: LocalStore, settings: ServeConfig, backend: Backend, sent: Path,
    released: BundleManifest,
) -> None:  # fmt: skip
    strict = judged(asked(backend), 1e-6)
    adapter_id = send(anna, sent / "full", released.bundle_id)
    OffsiteReturns(catalogue, store, settings.offsite, canary=strict).step()
    found = anna.get(f"{PLACE}/{adapter_id}").json()
    assert (found["state"], found["model_id"]) == ("rejected", None)
    assert "perplexity on plain text" in found["reasons"][0]
    assert Registry(store).served(BASE) == []
    assert list(store.list("adapters")) == []
    # The weights of a model that nobody will ever use are not kept.
    assert list(store.list("plug_ins")) == []
    assert anna.delete(f"{PLACE}/{adapter_id}").status_code == 200


def test_verdicts_on_canary_runs() -> None:
    def run(perplexity: float, finite: bool = True) -> CanaryReport:
        return judged(lambda model_id: CanaryReport(finite, 10.0, perplexity), 100.0)("ft:x")

    assert run(1000.0).ratio == 100.0
    for perplexity, finite, said in (
        (1001.0, True, "100.1 times the base model's; at most 100 is taken"),
        (float("inf"), False, "not finite"),
        (float("nan"), True, "nan times the base model's"),
    ):
        with pytest.raises(AdapterRejectedError, match=said):
            run(perplexity, finite)


@pytest.mark.parametrize(
    ("error", "times", "state"),
    [
        (StoreUnavailableError("the store is away"), 100, "inspecting"),
        (StoreError("a bug in a bucket's policy"), 100, "inspecting"),
        (RuntimeError("a bug"), 7, "inspecting"),
        (RuntimeError("a bug"), 8, "rejected"),
        (BusyError("the engine died"), 22, "inspecting"),
        (BusyError("the engine died"), 23, "rejected"),
    ],
)
def test_failures_that_pass_and_failures_that_stay(
    anna: TestClient, catalogue: Catalogue, store: LocalStore, settings: ServeConfig, sent: Path,
    released: BundleManifest, error: Exception, times: int, state: str,
) -> None:  # fmt: skip
    now, tries = [0.0], []

    def failing(todo: AcceptanceWork) -> Outcome:
        tries.append(now[0])
        raise error

    adapter_id = send(anna, sent / "full", released.bundle_id)
    returns = OffsiteReturns(
        catalogue, store, settings.offsite, accept=failing, canary=lambda model_id: None, clock=lambda: now[0]
    )
    for _ in range(times):
        returns.step()
        # At once is too early for another try.
        returns.step()
        now[0] += 1000
    assert tries == [1000.0 * number for number in range(times)]
    found = anna.get(f"{PLACE}/{adapter_id}").json()
    assert found["state"] == state
    assert not any("bug" in reason for reason in found["reasons"])
    # Whoever takes over after a crash finds it and goes on.
    OffsiteReturns(catalogue, store, settings.offsite, canary=lambda model_id: None).step()
    assert anna.get(f"{PLACE}/{adapter_id}").json()["state"] == ("rejected" if state == "rejected" else "accepted")


def test_an_upload_that_takes_long_holds_up_no_other(
    anna: TestClient, catalogue: Catalogue, store: LocalStore, settings: ServeConfig, sent: Path,
    released: BundleManifest,
) -> None:  # fmt: skip
    other = threading.Event()

    def inspect(todo: AcceptanceWork) -> Outcome:
        if todo.suffix == "slow":
            assert other.wait(60)
        return accept(todo)

    slow = send(anna, sent / "full", released.bundle_id, "slow")
    send(anna, sent / "bitfit", released.bundle_id, "quick")
    returns = OffsiteReturns(
        catalogue, store, settings.offsite, accept=inspect, canary=lambda model_id: "quick" in model_id and other.set()
    )
    assert returns.step() == 2
    assert anna.get(f"{PLACE}/{slow}").json()["state"] == "accepted"


@pytest.mark.parametrize("cut", ["accept", "canary", "promote"])
def test_a_controller_that_dies_in_the_middle_leaves_one_model(
    anna: TestClient, catalogue: Catalogue, store: LocalStore, settings: ServeConfig, sent: Path,
    released: BundleManifest, cut: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Died(BaseException):
        pass

    def dying(step: str, then: Callable[[str], object]) -> Callable[..., object]:
        def run(*values: object) -> object:
            found = then(*values)  # type: ignore[arg-type]
            if step == cut:
                raise Died
            return found

        return run

    adapter_id = send(anna, sent / "full", released.bundle_id)
    promote = Registry.promote
    monkeypatch.setattr(Registry, "promote", dying("promote", promote))  # type: ignore[arg-type]
    canary = dying("canary", lambda model_id: None)
    with pytest.raises(Died):
        OffsiteReturns(catalogue, store, settings.offsite, accept=dying("accept", accept), canary=canary).step()  # type: ignore[arg-type]
    monkeypatch.undo()
    assert anna.get(f"{PLACE}/{adapter_id}").json()["state"] == "inspecting"
    OffsiteReturns(catalogue, store, settings.offsite, canary=lambda model_id: None).step()
    found = anna.get(f"{PLACE}/{adapter_id}").json()
    assert found["state"] == "accepted"
    assert [record.model_id for record in Registry(store).served(BASE)] == [found["model_id"]]
    assert len([key for key in store.list("plug_ins") if "/journal/" in key]) == 1
    assert list(store.list("adapters")) == []


def test_abandoned_uploads_are_swept(
    database_url: str, anna: TestClient, store: LocalStore, settings: ServeConfig, sent: Path, released: BundleManifest
) -> None:
    begun = announce(anna, sent / "full", released.bundle_id).json()["id"]
    anna.put(f"{PLACE}/{begun}/files/manifest.json", content=(sent / "full" / "manifest.json").read_bytes())
    whole = send(anna, sent / "full", released.bundle_id)
    now = Catalogue.open(database_url).now()
    for later, left in ((settings.offsite.abandoned_s - 60, 2), (settings.offsite.abandoned_s + 60, 1)):
        catalogue = Catalogue.open(database_url, clock=lambda later=later: now + later)
        OffsiteReturns(catalogue, store, settings.offsite, canary=lambda model_id: None).sweep()
        catalogue.close()
        assert len(anna.get(PLACE).json()["data"]) == left
    assert anna.get(f"{PLACE}/{whole}").json()["state"] == "received"
    assert list(store.list(f"adapters/{begun}")) == []


class _Stubborn(LocalStore):
    """Keeps what lies at one place."""

    def __init__(self, root: Path, kept: str) -> None:
        super().__init__(root)
        self.kept = kept

    def delete_prefix(self, prefix: str) -> None:
        if prefix == self.kept:
            raise StoreError(f"{prefix} cannot be deleted")
        super().delete_prefix(prefix)


def test_bytes_whose_upload_is_over_are_swept_and_one_that_stays_harms_no_other(
    anna: TestClient, catalogue: Catalogue, store: LocalStore, settings: ServeConfig, sent: Path,
    released: BundleManifest,
) -> None:  # fmt: skip
    going_on = announce(anna, sent / "full", released.bundle_id).json()["id"]
    over = send(anna, sent / "full", released.bundle_id)
    OffsiteReturns(catalogue, store, settings.offsite, canary=lambda model_id: None).step()
    # As they are left by one that is killed after the verdict, or after the row was deleted.
    places = [f"adapters/{name}" for name in (over, "adp_0", "adp_1")]
    for place in [*places, f"adapters/{going_on}"]:
        store.write(f"{place}/adapter/manifest.json", b"{}")
    stubborn = _Stubborn(store.root, "adapters/adp_0")
    OffsiteReturns(catalogue, stubborn, settings.offsite, canary=lambda model_id: None).sweep()
    left = [key.rpartition("/adapter/")[0] for key in store.list("adapters")]
    assert left == sorted(["adapters/adp_0", f"adapters/{going_on}"])
