from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ot_ray.artifacts import PlugInRecord, Registry, parse_model_id
from ot_ray.errors import ArtifactError, NotFoundError, StoreError
from ot_ray.model import SplitPlan
from ot_ray.store import LocalStore
from tests.artifacts.samples import PLAN, flip

WHERE = ("opt", "acme", "support")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def registry(store: LocalStore) -> Registry:
    return Registry(store)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"layers.0.fc1.weight": torch.full((2, 3), value), "layers.3.fc1.bias": torch.ones(2, dtype=torch.bfloat16)}


def add(registry: Registry, value: float, where: tuple[str, str, str] = WHERE) -> PlugInRecord:
    report = {"full.perplexity": 12.5}
    return registry.add(*where, state(value), bundle_id="opt-1-0123456789ab", plan=PLAN, report=report)


def current(registry: Registry) -> list[str]:
    return [record.model_id for record in registry.current()]


def test_what_is_added_comes_back(registry: Registry, store: LocalStore) -> None:
    record = add(registry, 1.0)
    assert record.model_id == f"ft:opt:acme:support:{record.sha256[:12]}"
    again = Registry(store)
    assert again.get(record.model_id) == record
    assert (record.plan, record.report) == (SplitPlan(bottom=1, keep=2, top=1), {"full.perplexity": 12.5})
    loaded = again.load_state(record.model_id)
    assert loaded.keys() == state(1.0).keys()
    for name, tensor in state(1.0).items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_adding_does_not_promote(registry: Registry) -> None:
    add(registry, 1.0)
    assert current(registry) == []


def test_adding_the_same_again_returns_its_record(registry: Registry) -> None:
    assert add(registry, 1.0) == add(registry, 1.0)


def test_other_classes_make_another_plug_in(registry: Registry) -> None:
    def named(*classes: str) -> PlugInRecord:
        fields = {"bundle_id": "vit-1-0123456789ab", "plan": PLAN, "report": {}}
        return registry.add(*WHERE, state(1.0), **fields, classes=classes)  # type: ignore[arg-type]

    one, other = named("cat", "dog"), named("dog", "cat")
    assert (one.classes, other.classes) == (("cat", "dog"), ("dog", "cat"))
    assert len({one.model_id, other.model_id, add(registry, 1.0).model_id}) == 3
    assert named("dog", "cat") == other
    for record in (one, other):
        assert record.model_id.endswith(f":{record.sha256[:12]}")
        loaded = registry.load_state(record.model_id)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state(1.0).items())


def test_the_id_of_a_language_model_s_plug_in_follows_from_its_tensors_alone(registry: Registry) -> None:
    content = save(state(1.0))
    assert add(registry, 1.0).sha256 == hashlib.sha256(content).hexdigest()


def test_one_is_current_for_each_suffix(registry: Registry) -> None:
    one, two = add(registry, 1.0), add(registry, 2.0)
    other = add(registry, 3.0, ("opt", "zeta", "support"))
    for record in (one, two, other):
        registry.promote(record.model_id)
    assert current(registry) == sorted([two.model_id, other.model_id])


def test_rollback_goes_back_step_by_step(registry: Registry) -> None:
    one, two, three = (add(registry, value) for value in (1.0, 2.0, 3.0))
    for record in (one, two, three):
        registry.promote(record.model_id)
    assert registry.rollback(*WHERE) == two
    assert registry.rollback(*WHERE) == one
    with pytest.raises(NotFoundError, match="no earlier version"):
        registry.rollback(*WHERE)
    assert current(registry) == [one.model_id]


def test_promoting_again_is_no_step(registry: Registry, store: LocalStore) -> None:
    one, two = add(registry, 1.0), add(registry, 2.0)
    for record in (one, two, two):
        registry.promote(record.model_id)
    assert registry.rollback(*WHERE) == one
    assert len([key for key in store.list() if "/journal/" in key]) == 3


def test_withdrawn_leaves_nothing_and_rollback_skips_it(registry: Registry) -> None:
    one, two = add(registry, 1.0), add(registry, 2.0)
    registry.promote(one.model_id)
    registry.promote(two.model_id)
    assert registry.withdraw(*WHERE) == two.model_id
    assert current(registry) == []
    with pytest.raises(NotFoundError, match="nothing is current"):
        registry.withdraw(*WHERE)
    assert registry.rollback(*WHERE) == one
    assert current(registry) == [one.model_id]


def test_rollback_without_history(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="no earlier version"):
        registry.rollback(*WHERE)


def test_racing_promotions_all_stand_in_the_journal(registry: Registry, store: LocalStore) -> None:
    ids = [add(registry, float(value)).model_id for value in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(registry.promote, ids))
    keys = [key for key in store.list() if "/journal/" in key]
    assert [key.rpartition("/")[2] for key in keys] == [f"{number:06d}.json" for number in range(1, 9)]
    assert current(registry)[0] in ids


def test_unknown_ids(registry: Registry) -> None:
    unknown = "ft:opt:acme:support:000000000000"
    for call in (registry.get, registry.promote, registry.load_state):
        with pytest.raises(NotFoundError, match=unknown):
            call(unknown)


def test_changed_tensors_are_refused(registry: Registry, store: LocalStore) -> None:
    record = add(registry, 1.0)
    parts = parse_model_id(record.model_id)
    flip(store.root / "plug_ins" / "opt" / "acme" / "support" / parts.id / "adapter.safetensors", at=1)
    with pytest.raises(StoreError, match="sha256"):
        registry.load_state(record.model_id)


def test_record_of_another_is_refused(registry: Registry, store: LocalStore) -> None:
    one, two = (parse_model_id(add(registry, value).model_id).id for value in (1.0, 2.0))
    place = "plug_ins/opt/acme/support"
    store.write(f"{place}/{one}/record.json", store.read(f"{place}/{two}/record.json"))
    with pytest.raises(ArtifactError, match="restore it"):
        registry.get(f"ft:opt:acme:support:{one}")


def test_tensors_without_a_record_are_not_there(registry: Registry, store: LocalStore) -> None:
    record = add(registry, 1.0)
    store.delete(f"plug_ins/opt/acme/support/{record.sha256[:12]}/record.json")
    with pytest.raises(NotFoundError):
        registry.load_state(record.model_id)
    assert add(registry, 1.0).model_id == record.model_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "opt",
        "ft:opt:acme:support",
        "ft:opt:acme:support:xyz",
        "ft:opt:acme:support:0123456789ab\n",
        "ft:opt:acme:support:0123456789AB",
        "ft:opt:acme:support:0123456789ab:x",
        "ft:../x:acme:support:0123456789ab",
        "ft:opt::support:0123456789ab",
        "gt:opt:acme:support:0123456789ab",
    ],
)
def test_malformed_ids_are_refused(registry: Registry, text: str) -> None:
    with pytest.raises(ArtifactError, match="model id is"):
        registry.get(text)


def test_id_and_its_parts() -> None:
    parts = parse_model_id("ft:opt-6.7b:acme:v_1:0123456789ab")
    assert parts == ("opt-6.7b", "acme", "v_1", "0123456789ab")
    assert str(parts) == "ft:opt-6.7b:acme:v_1:0123456789ab"


@pytest.mark.parametrize("where", [("a/b", "t", "s"), ("m", "..", "s"), ("m", "t", "")])
def test_names_that_lead_elsewhere_are_refused(
    registry: Registry, store: LocalStore, where: tuple[str, str, str]
) -> None:
    with pytest.raises(ArtifactError, match="model id is"):
        add(registry, 1.0, where)
    with pytest.raises(ArtifactError, match="model id is"):
        registry.rollback(*where)
    assert list(store.list()) == []
