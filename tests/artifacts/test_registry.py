from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ot_ray.artifacts import PlugInRecord, Registry, parse_model_id, parse_model_name
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


def served(registry: Registry, *where: str) -> list[str]:
    return [record.model_id for record in registry.served(*(where or ("opt",)))]


def test_the_withdrawn_current_leaves_the_alias_empty_and_rollback_skips_it(registry: Registry) -> None:
    one, two = add(registry, 1.0), add(registry, 2.0)
    registry.promote(one.model_id)
    registry.promote(two.model_id)
    registry.withdraw(two.model_id)
    assert current(registry) == []
    assert served(registry) == [one.model_id]
    with pytest.raises(NotFoundError, match="no plug-in is in service as ft:opt:acme:support"):
        registry.resolve("ft:opt:acme:support")
    with pytest.raises(NotFoundError, match="is not in service"):
        registry.withdraw(two.model_id)
    assert registry.rollback(*WHERE) == one
    assert current(registry) == [one.model_id]
    assert registry.resolve("ft:opt:acme:support") == one


def test_every_promoted_version_answers_to_its_id_and_the_last_to_the_alias(registry: Registry) -> None:
    one, two, three = (add(registry, value) for value in (1.0, 2.0, 3.0))
    for record in (one, two):
        registry.promote(record.model_id)
    assert served(registry) == sorted([one.model_id, two.model_id])
    assert [registry.resolve(record.model_id) for record in (one, two)] == [one, two]
    assert registry.resolve("ft:opt:acme:support") == two
    with pytest.raises(NotFoundError, match=three.model_id):
        registry.resolve(three.model_id)


def test_a_withdrawn_older_version_leaves_the_current_one(registry: Registry) -> None:
    one, two, three = (add(registry, value) for value in (1.0, 2.0, 3.0))
    for record in (one, two, three):
        registry.promote(record.model_id)
    registry.withdraw(two.model_id)
    assert current(registry) == [three.model_id]
    assert served(registry) == sorted([one.model_id, three.model_id])
    with pytest.raises(NotFoundError, match=two.model_id):
        registry.resolve(two.model_id)
    assert registry.rollback(*WHERE) == one
    assert served(registry) == [one.model_id]


def test_what_is_out_of_service_is_known_with_its_time(registry: Registry) -> None:
    # Entries have whole seconds.
    begun = datetime.now(timezone.utc) - timedelta(seconds=2)
    ids = [add(registry, value).model_id for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    for model_id in ids[:4]:
        registry.promote(model_id)
    registry.rollback(*WHERE)
    registry.withdraw(ids[0])
    registry.withdraw(ids[1])
    registry.promote(ids[1])
    later = datetime.now(timezone.utc) + timedelta(seconds=1)
    assert registry.retired(begun) == [] and registry.retired(later) == sorted([ids[0], ids[3]])
    assert registry.remove(ids[0]) and registry.retired(later) == [ids[3]]


def test_what_was_rolled_back_or_withdrawn_is_served_again_once_promoted(registry: Registry) -> None:
    one, two = add(registry, 1.0), add(registry, 2.0)
    for record in (one, two):
        registry.promote(record.model_id)
    registry.rollback(*WHERE)
    assert served(registry) == [one.model_id]
    registry.promote(two.model_id)
    registry.withdraw(one.model_id)
    registry.promote(one.model_id)
    assert served(registry) == sorted([one.model_id, two.model_id])
    assert registry.resolve("ft:opt:acme:support") == one
    assert registry.rollback(*WHERE) == two


def test_what_is_not_in_service_can_be_removed_and_added_again(registry: Registry, store: LocalStore) -> None:
    never, kept, gone = (add(registry, value).model_id for value in (1.0, 2.0, 3.0))
    for model_id in (gone, kept):
        registry.promote(model_id)
    registry.withdraw(gone)
    assert [registry.remove(model_id) for model_id in (never, kept, gone)] == [True, False, True]
    assert served(registry) == [kept]
    assert len([key for key in store.list() if key.endswith(".safetensors")]) == 1
    for call in (registry.get, registry.promote):
        with pytest.raises(NotFoundError, match=never):
            call(never)
    assert registry.remove(never)
    assert add(registry, 1.0).model_id == never
    registry.promote(never)
    assert registry.load_state(never).keys() == state(1.0).keys()


class _Meddling(LocalStore):
    """Does something once, before it deletes or creates the first key that ends like this."""

    then: Callable[[], object] | None = None
    before = ""

    def delete(self, key: str) -> None:
        self._meddle(key)
        super().delete(key)

    def create(self, key: str, data: bytes) -> None:
        self._meddle(key)
        super().create(key, data)

    def _meddle(self, key: str) -> None:
        if self.then is not None and key.endswith(self.before):
            then, self.then = self.then, None
            then()


def test_a_promotion_and_a_removal_at_the_same_time(tmp_path: Path) -> None:
    store = _Meddling(tmp_path / "store")
    registry = Registry(store)
    one, two = (add(registry, value).model_id for value in (1.0, 2.0))
    # The promotion was there before the record went: the model stays.
    store.before, store.then = "record.json", lambda: registry.promote(one)
    assert not registry.remove(one)
    assert served(registry) == [one] and registry.load_state(one)
    # The removal came before the journal's entry: the model is not in service.
    store.before, store.then = "000002.json", lambda: registry.remove(two)
    with pytest.raises(NotFoundError, match=two):
        registry.promote(two)
    assert served(registry) == [one]


def test_a_plug_in_that_lost_its_tensors_is_mended_by_adding_it(registry: Registry, store: LocalStore) -> None:
    record = add(registry, 1.0)
    store.delete(f"plug_ins/opt/acme/support/{record.sha256[:12]}/adapter.safetensors")
    with pytest.raises(NotFoundError, match="add it again"):
        registry.promote(record.model_id)
    assert add(registry, 1.0) == record
    registry.promote(record.model_id)
    assert registry.load_state(record.model_id)


def test_served_is_by_model_and_tenant(registry: Registry) -> None:
    places = [WHERE, ("opt", "acme", "sales"), ("opt", "acme2", "support"), ("opt-2", "acme", "support")]
    records = [add(registry, float(number), where) for number, where in enumerate(places)]
    for record in records:
        registry.promote(record.model_id)
    ids = [record.model_id for record in records]
    assert served(registry, "opt", "acme") == sorted(ids[:2])
    assert served(registry, "opt") == sorted(ids[:3])
    assert served(registry, "opt-2") == ids[3:]
    assert served(registry, "nothing") == []
    for where in (("../opt",), ("opt", "a/b")):
        with pytest.raises(ArtifactError, match="is no name"):
            registry.served(*where)


def test_a_broken_record_harms_no_other(registry: Registry, store: LocalStore) -> None:
    one, two = add(registry, 1.0), add(registry, 2.0, ("opt", "zeta", "support"))
    for record in (one, two):
        registry.promote(record.model_id)
    store.write(f"plug_ins/opt/acme/support/{one.sha256[:12]}/record.json", b"{")
    assert served(registry) == [two.model_id]
    with pytest.raises(ArtifactError):
        registry.resolve(one.model_id)


def test_a_journal_from_before_several_versions_were_served(registry: Registry, store: LocalStore) -> None:
    one, two, three = (add(registry, value).model_id for value in (1.0, 2.0, 3.0))
    story = [("promote", one), ("promote", two), ("promote", one), ("rollback", two), ("rollback", one)]
    story += [("promote", three), ("withdraw", three)]
    expected = [one, two, one, two, one, three, None]
    for number, ((action, model_id), now) in enumerate(zip(story, expected, strict=True), 1):
        entry = {"action": action, "model_id": model_id, "at": "2026-01-01T00:00:00Z"}
        store.create(f"plug_ins/opt/acme/support/journal/{number:06d}.json", json.dumps(entry).encode())
        assert current(registry) == ([now] if now else [])
    assert served(registry) == [one]
    assert registry.rollback(*WHERE).model_id == one


@pytest.mark.parametrize("name", ["opt", "ft:opt:acme", "ft:opt:acme:support:", "ft:opt:acme:support:x", "", "ft:::"])
def test_names_that_are_no_plug_in_s_are_not_found(registry: Registry, name: str) -> None:
    with pytest.raises(NotFoundError, match="model id is"):
        registry.resolve(name)


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
    assert parts.alias == "ft:opt-6.7b:acme:v_1"
    alias = parse_model_name(parts.alias)
    assert (alias, str(alias)) == (parts._replace(id=""), parts.alias)
    assert parse_model_name(str(parts)) == parts


@pytest.mark.parametrize("where", [("a/b", "t", "s"), ("m", "..", "s"), ("m", "t", "")])
def test_names_that_lead_elsewhere_are_refused(
    registry: Registry, store: LocalStore, where: tuple[str, str, str]
) -> None:
    with pytest.raises(ArtifactError, match="model id is"):
        add(registry, 1.0, where)
    with pytest.raises(ArtifactError, match="model id is"):
        registry.rollback(*where)
    assert list(store.list()) == []
