"""The plug-in cache: shared tensors, loading once, capacity, and never an eviction of what is in use."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_service import BASE, PLAN, Shelf, byte_model
from transformers import PreTrainedModel

from ot_ray.errors import NotFoundError, SplitError, StoreUnavailableError
from ot_ray.model import adapter_state, plug_in
from ot_ray.model.families import layers_of
from serve.engine.plug_ins import PlugIn
from serve.engine.residency import PlugInCache
from serve.failures import BusyError

IDS = torch.arange(5, 25)[None]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_plug_in_answers_as_if_plugged_in_alone_and_leaves_the_base_as_it_was(shelf: Shelf) -> None:
    base = byte_model()
    before = logits(base)
    cache = PlugInCache(BASE, base, shelf)
    for model_id, state in shelf.states.items():
        with cache.use(model_id) as model:
            assert torch.equal(logits(model), logits(plug_in(base, PLAN, state)))
    with cache.use(BASE) as model:
        assert model is base
        assert torch.equal(logits(model), before)


def test_plug_ins_cost_their_adapters_bytes(base: PreTrainedModel, shelf: Shelf) -> None:
    cache = PlugInCache(BASE, base, shelf)
    with cache.use("ft:tiny:anna") as anna, cache.use("ft:tiny:ben") as ben:
        for layer in PLAN.middle(len(layers_of(base))):
            for mine, theirs in zip(
                layers_of(anna)[layer].parameters(), layers_of(base)[layer].parameters(), strict=True
            ):
                assert mine.data_ptr() == theirs.data_ptr()
        sizes = {p.data_ptr(): p.nbytes for model in (base, anna, ben) for p in model.parameters()}
    adapter = sum(tensor.nbytes for tensor in adapter_state(base, PLAN).values())
    assert sum(sizes.values()) == sum(p.nbytes for p in base.parameters()) + 2 * adapter


def test_one_key_loads_once_and_others_load_beside_it(base: PreTrainedModel) -> None:
    shelf = Shelf(base, ["anna", "ben"], load_s=0.2)
    cache = PlugInCache(BASE, base, shelf)

    def use(model_id: str) -> int:
        with cache.use(model_id) as model:
            return id(model)

    with ThreadPoolExecutor(8) as threads:
        models = set(threads.map(use, ["ft:tiny:anna", "ft:tiny:ben"] * 4))
    assert len(models) == 2
    assert shelf.loads == {"ft:tiny:anna": 1, "ft:tiny:ben": 1}
    assert shelf.most_loading == 2


def test_base_answers_rightly_while_plug_ins_come_and_go() -> None:
    base = byte_model()
    shelf = Shelf(base, ["a", "b", "c"])
    cache = PlugInCache(BASE, base, shelf, max_plug_ins=1)
    right, stop = logits(base), threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for model_id in shelf.states:
                with cache.use(model_id):
                    pass

    with ThreadPoolExecutor(1) as threads:
        loader = threads.submit(churn)
        try:
            for _ in range(40):
                with cache.use(BASE) as model:
                    assert torch.equal(logits(model), right)
        finally:
            stop.set()
        loader.result()
    assert sum(shelf.loads.values()) > 3


def test_hammering_never_evicts_in_use_nor_passes_capacity(base: PreTrainedModel) -> None:
    shelf = Shelf(base, list("abcdef"), load_s=0.001)
    cache = PlugInCache(BASE, base, shelf, max_plug_ins=3)
    in_use: dict[str, int] = dict.fromkeys(shelf.states, 0)
    lock, wrong = threading.Lock(), []

    def hammer(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(25):
            model_id = draw.choice(list(shelf.states))
            with cache.use(model_id) as model:
                with lock:
                    in_use[model_id] += 1
                time.sleep(draw.random() * 0.004)
                expected = shelf.states[model_id]["layers.0.fc1.weight"]
                with lock:
                    resident = cache.resident()
                    if len(resident) > 3 or not {key for key, uses in in_use.items() if uses} <= set(resident):
                        wrong.append((resident, dict(in_use)))
                    in_use[model_id] -= 1
                if not torch.equal(layers_of(model)[0].fc1.weight, expected):
                    wrong.append(model_id)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(hammer, range(6)))
    assert wrong == []
    assert len(cache.resident()) == 3


def test_least_recently_used_leaves_first(base: PreTrainedModel) -> None:
    shelf = Shelf(base, ["a", "b", "c"])
    cache = PlugInCache(BASE, base, shelf, max_plug_ins=2)
    for tenant in "abac":
        with cache.use(f"ft:tiny:{tenant}"):
            pass
    assert cache.resident() == ["ft:tiny:a", "ft:tiny:c"]
    assert shelf.loads["ft:tiny:a"] == 1


def test_newcomer_waits_for_room_and_is_refused_in_time(base: PreTrainedModel, shelf: Shelf) -> None:
    cache = PlugInCache(BASE, base, shelf, max_plug_ins=1, wait_s=0.1)
    with cache.use("ft:tiny:anna"):
        with pytest.raises(BusyError, match="max_plug_ins"), cache.use("ft:tiny:ben"):
            pass
        assert cache.resident() == ["ft:tiny:anna"]

    patient = PlugInCache(BASE, base, shelf, max_plug_ins=1, wait_s=30)
    with ThreadPoolExecutor(1) as threads:
        with patient.use("ft:tiny:anna"):

            def use_ben() -> list[str]:
                with patient.use("ft:tiny:ben"):
                    return patient.resident()

            waiting = threads.submit(use_ben)
            time.sleep(0.05)
            assert not waiting.done()
        assert waiting.result(10) == ["ft:tiny:ben"]


def test_unknown_and_withdrawn_ids_are_not_found(base: PreTrainedModel, shelf: Shelf) -> None:
    cache = PlugInCache(BASE, base, shelf, refresh_s=0)
    with pytest.raises(NotFoundError, match="ft:tiny:nobody"), cache.use("ft:tiny:nobody"):
        pass
    with cache.use("ft:tiny:anna"):
        pass
    del shelf.states["ft:tiny:anna"]
    with pytest.raises(NotFoundError), cache.use("ft:tiny:anna"):
        pass
    assert cache.resident() == []


def test_failed_load_is_told_to_all_that_wait_and_tried_anew(base: PreTrainedModel) -> None:
    shelf = Shelf(base, ["anna"], load_s=0.1)
    whole = shelf.states["ft:tiny:anna"]
    shelf.states["ft:tiny:anna"] = {name: tensor for name, tensor in whole.items() if "fc1" not in name}
    cache = PlugInCache(BASE, base, shelf)

    def use(_: int) -> str:
        with pytest.raises(SplitError) as caught, cache.use("ft:tiny:anna"):
            pass
        return str(caught.value)

    with ThreadPoolExecutor(3) as threads:
        assert all("fc1" in message for message in threads.map(use, range(3)))
    assert cache.resident() == []
    shelf.states["ft:tiny:anna"] = whole
    with cache.use("ft:tiny:anna"):
        assert cache.resident() == ["ft:tiny:anna"]


def test_catalogue_is_read_at_most_every_refresh_s_and_outages_are_bridged(base: PreTrainedModel, shelf: Shelf) -> None:
    now = [100.0]
    shelf.error = StoreUnavailableError("down")
    cache = PlugInCache(BASE, base, shelf, refresh_s=10, clock=lambda: now[0])
    readers = (cache.plug_ins, lambda: cache.find("ft:tiny:anna"))
    for read in readers:
        with pytest.raises(StoreUnavailableError):
            read()
    shelf.error = None
    for read in readers:
        before = shelf.readings
        expected = read()
        now[0] += 9.9
        assert read() == expected
        assert shelf.readings == before + 1
        shelf.error = StoreUnavailableError("down")
        now[0] += 0.2
        assert read() == expected
        assert shelf.readings == before + 2
        shelf.error = None
    # That there is no such model is a reading too.
    before = shelf.readings
    for _ in range(3):
        with pytest.raises(NotFoundError):
            cache.find("ft:tiny:nobody")
    assert shelf.readings == before + 1


def test_evicted_adapters_come_back_from_the_host_and_then_from_the_store(base: PreTrainedModel) -> None:
    shelf = Shelf(base, ["a", "b", "c"])
    cache = PlugInCache(BASE, base, shelf, max_plug_ins=1, max_host_plug_ins=2)
    for tenant in "ababcca":
        with cache.use(f"ft:tiny:{tenant}") as model:
            assert torch.equal(logits(model), logits(plug_in(base, PLAN, shelf.states[f"ft:tiny:{tenant}"])))
    assert cache.hits == {"device": 1, "host": 2, "store": 4}
    assert shelf.loads == {"ft:tiny:a": 2, "ft:tiny:b": 1, "ft:tiny:c": 1}


def test_one_that_waits_for_room_gets_it_though_the_others_go_on(base: PreTrainedModel, shelf: Shelf) -> None:
    cache = PlugInCache(BASE, base, shelf, max_plug_ins=1)
    anna, ben = cache.find("ft:tiny:anna"), cache.find("ft:tiny:ben")
    assert anna is not None
    assert ben is not None
    first, second = cache.try_hold(anna), cache.try_hold(anna)
    assert first is second is not None
    assert first.model.result(60)
    assert cache.try_hold(ben) is None
    # From now on nobody else gets in before the one that waits.
    assert cache.try_hold(anna) is None
    cache.release(first)
    assert cache.try_hold(ben) is None
    cache.release(first)
    assert cache.try_hold(anna) is None
    held = cache.try_hold(ben)
    assert held is not None
    assert cache.resident() == ["ft:tiny:ben"]
    cache.release(held)
    assert held.model.result(60)
    assert cache.try_hold(anna) is not None


def test_a_store_that_hangs_holds_one_reader(base: PreTrainedModel, shelf: Shelf) -> None:
    cache = PlugInCache(BASE, base, shelf, refresh_s=0)
    known = cache.find("ft:tiny:anna")
    hangs, goes_on, find, reads = threading.Event(), threading.Event(), shelf.find, []

    def hanging(name: str) -> PlugIn:
        reads.append(name)
        hangs.set()
        assert goes_on.wait(60)
        return find(name)

    shelf.find = hanging  # type: ignore[method-assign]
    with ThreadPoolExecutor(3) as threads:
        try:
            first = threads.submit(cache.find, "ft:tiny:anna")
            assert hangs.wait(60)
            assert threads.submit(cache.find, "ft:tiny:anna").result(60) == known
            assert reads == ["ft:tiny:anna"]
        finally:
            goes_on.set()
        assert first.result(60) == known


def test_a_load_that_gets_no_thread_leaves_nothing_behind(
    base: PreTrainedModel, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PlugInCache(BASE, base, shelf, max_plug_ins=1)

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", refused)
        with pytest.raises(RuntimeError, match="new thread"), cache.use("ft:tiny:anna"):
            pass
    assert cache.resident() == []
    with cache.use("ft:tiny:ben"):
        assert cache.resident() == ["ft:tiny:ben"]
