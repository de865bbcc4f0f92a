"""Deleting a model over HTTP: what the audit log tells of it, whatever fails in between."""

from __future__ import annotations

import pytest
import torch

from ot_ray.artifacts import Registry
from ot_ray.errors import StoreUnavailableError
from ot_ray.model import SplitPlan
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from tests.http.tiny_service import BASE
from tests.service.clients import ClientOf


@pytest.fixture
def model_id(store: LocalStore) -> str:
    """A model of anna's in service."""
    state = {"layers.0.fc1.bias": torch.ones(2)}
    plan, registry = SplitPlan(bottom=1, keep=2, top=1), Registry(store)
    record = registry.add(BASE, "anna", "tone", state, bundle_id="b-1", plan=plan, report={})
    registry.promote(record.model_id)
    return record.model_id


def lines(catalogue: Catalogue) -> list[tuple[str, str]]:
    return [(line.target, line.outcome) for line in catalogue.audit.walk(action="model.delete")]


def test_a_deletion_is_in_the_audit_log_before_and_after(
    client_of: ClientOf, catalogue: Catalogue, store: LocalStore, model_id: str
) -> None:
    anna = client_of("anna")
    assert [anna.delete(f"/v1/models/{model_id}").status_code for _ in range(2)] == [200, 404]
    assert lines(catalogue) == [(model_id, "begun"), (model_id, "ok")]
    assert Registry(store).get(model_id).model_id == model_id, "what is stored stays for a while"
    assert Registry(store).remove(model_id)
    assert anna.delete(f"/v1/models/{model_id}").status_code == 404


def test_a_deletion_that_breaks_off_has_its_line(
    client_of: ClientOf,
    catalogue: Catalogue,
    store: LocalStore,
    model_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cut_off(registry: Registry, model_id: str) -> None:
        withdraw(registry, model_id)
        raise StoreUnavailableError("gone")

    withdraw, anna = Registry.withdraw, client_of("anna")
    monkeypatch.setattr(Registry, "withdraw", cut_off)
    assert anna.delete(f"/v1/models/{model_id}").status_code == 503
    assert Registry(store).served(BASE) == [] and lines(catalogue) == [(model_id, "begun")]
