"""A store at a folder of another: the same bytes under shorter keys, and nothing beside that folder."""

from __future__ import annotations

import pickle

import pytest
from faulty_proxy import FaultyProxy

from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError, StoreUnavailableError
from ot_ray.store import PatientStore, Store, open_store, scoped


def test_it_is_the_folder_of_the_other_store(store: Store) -> None:
    inner = scoped(store, "jobs/one two")
    inner.create("events/00000001.json", b"first")
    store.write("jobs/one two/input", b"data")
    assert [*inner.list()] == ["events/00000001.json", "input"]
    assert inner.read("input") == b"data"
    assert store.read("jobs/one two/events/00000001.json") == b"first"
    with pytest.raises(AlreadyExistsError):
        inner.create("input", b"other")


def test_what_lies_beside_is_out_of_its_sight(store: Store) -> None:
    for key in ("jobs/a/mine", "jobs/ab/theirs", "jobs/b/theirs", "mine"):
        store.write(key, key.encode())
    inner = scoped(store, "jobs/a")
    assert [*inner.list()] == ["mine"]
    for key in ("../b/theirs", "/jobs/b/theirs", "..", "mine/../../b/theirs"):
        with pytest.raises(StoreError, match=r"holds|absolute"):
            inner.read(key)
    with pytest.raises(NotFoundError):
        inner.read("theirs")
    inner.delete("theirs")
    assert [*store.list()] == ["jobs/a/mine", "jobs/ab/theirs", "jobs/b/theirs", "mine"]


def test_it_is_rebuilt_by_its_url_and_from_a_pickle(store: Store) -> None:
    inner = scoped(scoped(store, "a"), "b c%")
    inner.write("key", b"value")
    for again in (open_store(inner.url), pickle.loads(pickle.dumps(inner))):
        assert again.url == inner.url
        assert [*again.list()] == ["key"]
        assert again.read("key") == b"value"
    assert store.read("a/b c%/key") == b"value"


def test_the_empty_prefix_is_the_store_itself(store: Store) -> None:
    assert scoped(store, "") is store
    for prefix in ("..", "a/../b", "/a", "a//b"):
        with pytest.raises(StoreError):
            scoped(store, prefix)


def test_patience_goes_along(proxied_url: str, proxy: FaultyProxy) -> None:
    told: list[str] = []
    inner = scoped(PatientStore(open_store(proxied_url), 0.0, told.append), "a")
    assert isinstance(inner, PatientStore)
    inner.write("key", b"value")
    proxy.forever = 503
    with pytest.raises(StoreUnavailableError, match="gave up"):
        inner.read("key")


def test_a_store_without_folders_is_refused() -> None:
    with pytest.raises(StoreError, match="cannot be narrowed"):
        scoped(object(), "a")  # type: ignore[arg-type]
